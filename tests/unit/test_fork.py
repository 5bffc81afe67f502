"""Copies of a run for several echoes."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image
from run_files import silent, tree

from echodistill_core.concept.photographs import Photograph
from echodistill_core.errors import InputError
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources, settings_for
from echodistill_core.settings import EchoSettings, TrainSettings
from echodistill_core.training import session
from echodistill_core.training.fork import fork_for_echo
from echodistill_core.training.run import Run

TINY = ModelSources(family="tiny")
ECHO = EchoSettings(iterations=1, pool_size=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = settings_for(
        TrainSettings, {"class_noun": "dog", "iterations": 1, "preview_every": 0, "device": "cpu"}, TINY
    )
    photographs = [Photograph(f"{c}", Image.new("RGB", (64, 64), c)) for c in ("red", "green", "blue")]
    folder = tmp_path_factory.mktemp("fork") / "run"
    return session.train(photographs, open_family(TINY), settings, TINY, folder, silent)


def test_an_echo_in_the_copy_is_the_echo_and_leaves_the_run_alone(run, tmp_path):
    before = tree(run.folder)
    copy = fork_for_echo(run, ECHO)
    assert tree(copy.folder) == before
    assert fork_for_echo(run, ECHO).folder == copy.folder
    other = fork_for_echo(run, EchoSettings(iterations=1, pool_size=3))
    assert other.folder != copy.folder
    family = open_family(TINY)
    echoed = session.echo(copy, family, ECHO, silent)
    assert tree(run.folder) == before
    # The same by hand: a whole copy of the folder, echoed.
    import shutil

    shutil.copytree(run.folder, tmp_path / "by hand")
    record = json.loads((tmp_path / "by hand" / "run.json").read_text())
    by_hand = session.echo(Run(tmp_path / "by hand", record), family, ECHO, silent)
    for role in ("student", "teacher"):
        name = f"{role}.safetensors"
        assert echoed.path("echo", name).read_bytes() == by_hand.path("echo", name).read_bytes()
    with pytest.raises(InputError, match="has been echoed already"):
        fork_for_echo(echoed, ECHO)


def test_a_disk_without_links_gets_copies(run, monkeypatch):
    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    copy = fork_for_echo(run, EchoSettings(iterations=2, pool_size=2))
    assert tree(copy.folder) == tree(run.folder)


def test_a_run_that_is_not_trained_to_its_end_is_refused(run, tmp_path):
    unfinished = Run(tmp_path, {**run.record, "finished": {}})
    with pytest.raises(InputError, match="not trained to its end"):
        fork_for_echo(unfinished, ECHO)
