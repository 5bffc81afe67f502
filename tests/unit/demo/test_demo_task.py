"""The concept that a demo learns, its prompts, its folder, and input that is refused."""

import sys
import webbrowser
from pathlib import Path

import pytest

from echodistill_core.cli import main, progress
from echodistill_core.demo import demo
from echodistill_core.demo.settings import DemoSettings
from echodistill_core.demo.task import choose
from echodistill_core.miniature.concepts import DEVELOPMENT, EVALUATION
from echodistill_core.miniature.world import CONTEXTS


def test_the_default_is_a_development_concept_with_its_photographs():
    task, concept = choose(DemoSettings(), []), DEVELOPMENT[0]
    assert concept.name == "dotted-mug"
    assert task == choose(DemoSettings(concept="dotted-mug"), [])
    assert task.title == "an orange and purple dotted mug with a white cross"
    assert (task.class_noun, len(task.photographs)) == ("mug", 5)
    truth = {"shape": "mug", "color": "orange", "second": "purple", "pattern": "dotted", "emblem": "cross"}
    assert task.attributes == truth


@pytest.mark.parametrize("concept", DEVELOPMENT, ids=lambda concept: concept.name)
def test_the_six_prompts_begin_with_the_places_that_no_photograph_shows(concept):
    task = choose(DemoSettings(concept=concept.name), [])
    new = set(CONTEXTS) - set(concept.contexts)
    assert len(set(task.contexts)) == 6
    assert set(task.contexts[: len(new)]) == new
    noun = concept.subject.shape
    assert task.prompts("<new1>") == [f"a <new1> {noun} {CONTEXTS[context]}" for context in task.contexts]
    assert task.prompts() == [f"a {noun} {CONTEXTS[context]}" for context in task.contexts]


def test_photographs_of_the_users_own(photographs):
    task = choose(DemoSettings(class_noun=" coffee  mug "), [str(photographs)])
    assert (task.class_noun, task.title, task.attributes) == ("coffee mug", "your coffee mug", None)
    assert [p.name for p in task.photographs] == ["0.png", "1.png", "2.png"]
    assert task.prompts("<new1>")[0] == "a <new1> coffee mug on the beach"


@pytest.mark.parametrize(
    ("flags", "reasons"),
    [
        (["--concept", "doted-mug"], ["'doted-mug'", "did you mean dotted-mug?", "halved-ball"]),
        (["--concept", EVALUATION[0].name], [EVALUATION[0].name, "expected one of dotted-mug"]),
        (["--photos", "PHOTOS"], ["class_noun is empty", "--class-noun dog"]),
        (["--photos", "PHOTOS", "--class-noun", "  "], ["class_noun is empty"]),
        (["--photos", "no-such-folder", "--class-noun", "dog"], ["no-such-folder"]),
        (["--class-noun", "dog"], ["'dog'", "--photos"]),
        (["--photos", "PHOTOS", "--class-noun", "dog", "--concept", "dotted-mug"], ["'dotted-mug'", "leave out"]),
        (["--iterations", "0"], ["iterations is 0", "1 or more"]),
        (["--echo-iterations", "0"], ["echo_iterations is 0"]),
        (["--device", "abacus"], ["abacus"]),
        (["--out", "taken.txt"], ["taken.txt", "is a file"]),
        (["--out", "full"], ["full", "not empty"]),
        (["--itterations", "3"], ["--itterations", "did you mean --iterations?"]),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(photographs, tmp_path, capsys, monkeypatch, flags, reasons):
    (tmp_path / "taken.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(demo, "open_family", lambda sources: pytest.fail("models were opened"))
    flags = [str(photographs) if flag == "PHOTOS" else flag for flag in flags]
    assert main(["demo", "--family", "tiny", *flags]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("echodistill: ")
    assert last.endswith(".")
    assert all(reason in last for reason in reasons), last
    assert sorted(tmp_path.rglob("*")) == before


def test_each_demo_has_a_folder_of_its_own_and_the_same_command_the_same(make_photographs, monkeypatch):
    folders = []

    def learn(task, settings, folder, listen, tell):
        folders.append(folder)
        return folder / "index.html"

    monkeypatch.setattr(demo, "learn", learn)
    one, other = ["--photos", str(make_photographs()), "--class-noun", "dog"], str(make_photographs(seed=1))
    commands = [
        [],
        one,
        ["--photos", other, "--class-noun", "dog"],
        [*one[:-1], "cat"],
        [*one, "--seed", "1"],
        [*one, "--echo-iterations", "7"],
        ["--concept", "halved-fish"],
    ]
    for command in commands:
        assert main(["demo", *command]) == 0
    assert folders[0] == Path("runs/demo")
    assert len(set(folders)) == len(commands)
    assert main(["demo", *one, "--no-open", "--device", "cpu"]) == 0
    assert folders[-1] == folders[1]


@pytest.mark.parametrize(
    ("terminal", "display", "flag", "opens"),
    [
        (True, True, "--open", True),
        (True, True, "--no-open", False),
        (False, True, "--open", False),
        (True, False, "--open", False),
    ],
)
def test_the_page_opens_only_with_a_terminal_and_a_display(monkeypatch, capsys, terminal, display, flag, opens):
    monkeypatch.setattr(demo, "learn", lambda *_: Path("runs/a b/index.html"))
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(progress.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if display:
        monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert main(["demo", flag]) == 0
    assert opened == ([Path.cwd().joinpath("runs/a b/index.html").as_uri()] if opens else [])
    assert "runs/a b/index.html" in capsys.readouterr().err
