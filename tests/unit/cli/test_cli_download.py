"""`echodistill download`, without a network."""

import dataclasses
import re

import pytest
from command_line import refused

from echodistill_core.cli import main
from echodistill_core.errors import InputError
from echodistill_core.models import download as downloads


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the download command asked of the hub: a list of ("plan" or "download", names, endpoint, cache)."""
    calls = []
    planned = [
        downloads.PlannedFile("dino", "facebook/dino-vits16", "model.safetensors", 87_000_000, "Apache-2.0", False)
    ]

    def plan(names, endpoint=None, cache_dir=None):
        calls.append(("plan", list(names), endpoint, cache_dir))
        return planned

    def download(files, endpoint=None, cache_dir=None):
        calls.append(("download", [f.name for f in files], endpoint, cache_dir))
        return {"dino": tmp_path / "cache"}

    monkeypatch.setattr(downloads, "plan", plan)
    monkeypatch.setattr(downloads, "download", download)
    calls.append(planned)
    return calls


def answer(monkeypatch, text, tty=True):
    monkeypatch.setattr("sys.stdin.isatty", lambda: tty, raising=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or text)
    return asked


def test_nothing_is_downloaded_where_nobody_can_agree(hub, monkeypatch, capsys):
    asked = answer(monkeypatch, "y", tty=False)
    assert main(["download", "dino"]) == 2
    printed = capsys.readouterr()
    assert "87.0" in printed.out  # the plan is shown all the same
    assert "Apache-2.0" in printed.out
    assert re.fullmatch(r"echodistill: nothing was downloaded.* add --yes .*\.\n", printed.err)
    assert [c[0] for c in hub[1:]] == ["plan"]
    assert asked == []


@pytest.mark.parametrize("text", ["", "n", "no", "what?"])
def test_nothing_is_downloaded_without_a_yes(hub, monkeypatch, capsys, text):
    asked = answer(monkeypatch, text)
    assert main(["download", "dino"]) == 0
    assert len(asked) == 1
    assert [c[0] for c in hub[1:]] == ["plan"]
    assert "nothing was downloaded" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["y", "YES "])
def test_a_yes_downloads_what_was_planned(hub, monkeypatch, capsys, text):
    answer(monkeypatch, text)
    assert main(["download", "dino", "--endpoint", "https://mirror.example", "--cache-dir", "here"]) == 0
    assert hub[1:] == [
        ("plan", ["dino"], "https://mirror.example", "here"),
        ("download", ["dino"], "https://mirror.example", "here"),
    ]
    assert "dino: " in capsys.readouterr().err


def test_yes_asks_nobody(hub, monkeypatch):
    asked = answer(monkeypatch, "n", tty=False)
    assert main(["download", "dino", "--yes"]) == 0
    assert asked == []
    assert [c[0] for c in hub[1:]] == ["plan", "download"]


def test_what_is_here_already_is_not_asked_for(hub, monkeypatch):
    hub[0][0] = dataclasses.replace(hub[0][0], cached=True)
    asked = answer(monkeypatch, "y")
    assert main(["download", "dino"]) == 0
    assert asked == []
    assert [c[0] for c in hub[1:]] == ["plan"]


@pytest.mark.parametrize("step", ["plan", "download"])
def test_errors_of_the_hub_pass_through(hub, monkeypatch, capsys, step):
    def fail(*args, **options):
        raise InputError("the hub cannot be reached; check the connection.")

    monkeypatch.setattr(downloads, step, fail)
    assert main(["download", "dino", "--yes"]) == 2
    assert capsys.readouterr().err == "echodistill: the hub cannot be reached; check the connection.\n"


def test_an_unknown_name_is_answered_without_the_network(capsys):
    refused(capsys, ["download", "sd-turbo-familly", "--yes"], "sd-turbo-familly", "sd-turbo-family")
