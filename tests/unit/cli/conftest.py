"""Fixtures for tests of the command line: a folder for each test, fast models, and finished runs to read.

run_folder -> Path      a finished and echoed run with a two-word noun, its own placeholder and two vectors
undisturbed -> Path     a finished run of two iterations
"""

import contextlib
import copy
import dataclasses

import pytest
from command_line import train_command

from echodistill_core import reporting
from echodistill_core.cli import commands, main
from echodistill_core.files import write_bytes
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import ModelSources

PLOT_LOSSES = reporting.plot_losses
_made = {}


def _open_family_once(sources, *, with_teacher=True):
    if dataclasses.replace(sources, backbones="") != ModelSources(family="tiny"):
        return open_family(sources, with_teacher=with_teacher)
    if with_teacher not in _made:
        _made[with_teacher] = open_family(sources, with_teacher=with_teacher)
    tokenizer = _made[with_teacher].text.tokenizer  # never modified, and the slowest part to copy
    return copy.deepcopy(_made[with_teacher], {id(tokenizer): tokenizer})


@contextlib.contextmanager
def _fast(plot=lambda rows, path, title: write_bytes(path, b"a plot")):
    """Copy the tiny family instead of making it each time, and draw no loss plots: most of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "open_family", _open_family_once)
        patch.setattr(reporting, "plot_losses", plot)
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Commands may write into the current folder."""
    monkeypatch.chdir(tmp_path)
    with _fast():
        yield


@pytest.fixture(scope="session")
def run_folder(photographs, tmp_path_factory):
    """A finished and echoed run. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "mug"
    flags = ["--placeholder", "<my-mug>", "--vectors", "2", "--preview-every", "2", "--checkpoint-every", "2"]
    with _fast(PLOT_LOSSES):
        assert main(train_command(photographs, folder, *flags, noun="coffee mug", iterations=3)) == 0
        assert main(["echo", str(folder), "--iterations", "2", "--pool-size", "2"]) == 0
    return folder


@pytest.fixture(scope="session")
def undisturbed(photographs, tmp_path_factory):
    """A run of two iterations that nothing interrupted. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "control"
    with _fast():
        assert main(train_command(photographs, folder, iterations=2)) == 0
    return folder
