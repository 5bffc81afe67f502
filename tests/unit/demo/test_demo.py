"""Whole demos with the tiny family."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pages import Reader
from PIL import Image
from registries import replace_entry

from echodistill_core.cli import main
from echodistill_core.demo import demo
from echodistill_core.demo.settings import DemoSettings
from echodistill_core.demo.task import choose
from echodistill_core.errors import InputError
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import FAMILIES, ModelSources
from echodistill_core.training.events import StepDone

QUICK = {"batch_size": 1, "swd_projections": 8, "log_every": 1, "preview_every": 0, "checkpoint_every": 2}
SETTINGS = DemoSettings(family="tiny", iterations=4, echo_iterations=2, device="cpu", open=False)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Few and small iterations, and one tiny family for all demos: each of them restores it."""
    family = open_family(ModelSources(family="tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "open_family", lambda sources: family)
        patch.setattr(demo, "RUN_SETTINGS", QUICK)
        replace_entry(patch, FAMILIES, "tiny", dataclasses.replace(FAMILIES["tiny"], echo_defaults={"pool_size": 2}))
        patch.setattr(demo, "TEACHER_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of the default concept that nothing interrupted, and what it told. Read only."""
    told = []
    folder = tmp_path_factory.mktemp("demos") / "mug"
    demo.learn(choose(SETTINGS, []), SETTINGS, folder, lambda event: None, told.append)
    return folder, told


def test_a_demo_trains_with_the_familys_recommended_settings(monkeypatch):
    values = {"student_lr": 3e-4, "iterations": 999, "checkpoint_every": 999}
    table = dataclasses.replace(FAMILIES["tiny"], defaults=values, echo_defaults={"real_share": 0.25, "pool_size": 2})
    replace_entry(monkeypatch, FAMILIES, "tiny", table)
    distil, echo = demo.stage_settings(choose(SETTINGS, []), SETTINGS)
    assert (distil.student_lr, distil.iterations, distil.checkpoint_every) == (3e-4, 4, 2)
    assert (echo.real_share, echo.iterations, echo.pool_size) == (0.25, 2, 2)


def test_a_demo_is_a_run_folder_with_a_page(finished, capsys):
    folder, told = finished
    assert [line[:4] for line in told] == ["1/5 ", "2/5 ", "3/5 ", "4/5 ", "5/5 "]
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["finished"]) == {"distil", "echo"}
    assert facts["settings"]["iterations"] == 4
    assert facts["echo"]["iterations"] == 2
    read = Reader((folder / "index.html").read_text(encoding="utf-8"))
    assert len(read.images) == 5 + 6 * 4
    for i in range(5):
        stored = np.array(Image.open(folder / "photographs" / f"{i:03d}.png"))
        np.testing.assert_array_equal(read.images[i][1], stored)


def test_the_pages_pictures_are_those_that_sample_makes(finished, tmp_path):
    folder, _ = finished
    read = Reader((folder / "index.html").read_text(encoding="utf-8"))
    task = choose(SETTINGS, [])
    stages = {1: ["--stage", "distil"], 2: ["--stage", "echo"]}
    stages[3] = ["--stage", "distil", "--role", "teacher", "--steps", "2"]
    for column, flags in stages.items():
        command = ["sample", str(folder), "--device", "cpu", "--prompt", *task.prompts("<new1>"), *flags]
        assert main([*command, "--out", f"{column}.png"]) == 0
        for i in range(6):
            made = np.array(Image.open(f"{column}_{i:03d}.png"))
            np.testing.assert_array_equal(read.images[5 + 4 * i + column][1], made)
    # Before training: no adapter, so the plain noun.
    command = ["sample", "--family", "tiny", "--device", "cpu", "--prompt", *task.prompts(), "--out", "0.png"]
    assert main(command) == 0
    for i in range(6):
        np.testing.assert_array_equal(read.images[5 + 4 * i][1], np.array(Image.open(f"0_{i:03d}.png")))


def test_the_same_demo_again_is_shown_without_training(finished, monkeypatch):
    folder, _ = finished
    page, record = (folder / "index.html").read_text(encoding="utf-8"), (folder / "demo.json").read_bytes()
    (folder / "index.html").unlink()
    told = []

    def listen(event):
        pytest.fail(f"it trained: {event}")

    assert demo.learn(choose(SETTINGS, []), SETTINGS, folder, listen, told.append) == folder / "index.html"
    again = (folder / "index.html").read_text(encoding="utf-8")
    assert sum("found finished" in line for line in told) == 2
    assert (folder / "demo.json").read_bytes() == record
    pictures = [Reader(text).images for text in (page, again)]
    for (words, first), (_, second) in zip(*pictures, strict=True):
        np.testing.assert_array_equal(first, second, err_msg=words)
    lead = re.search(r'class="lead">[^<]*', page)
    assert lead is not None
    assert lead[0] in again


@pytest.mark.parametrize("stage", ["distil", "echo"])
def test_an_interrupted_demo_goes_on_to_the_same_result(finished, tmp_path, stage):
    folder, told = tmp_path / "demo", []

    def stop(event):
        if isinstance(event, StepDone) and (event.stage, event.step) == (stage, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.learn(choose(SETTINGS, []), SETTINGS, folder, stop, told.append)
    assert not (folder / "index.html").exists()
    spent = json.loads((folder / "demo.json").read_text())["seconds"][stage]
    assert spent > 0
    demo.learn(choose(SETTINGS, []), SETTINGS, folder, lambda event: None, told.append)
    assert any("going on from the last checkpoint" in line for line in told)
    assert json.loads((folder / "demo.json").read_text())["seconds"][stage] > spent
    for name in ("distil/student.safetensors", "distil/teacher.safetensors", "echo/student.safetensors"):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes()
    both = [Reader((place / "index.html").read_text(encoding="utf-8")).images for place in (folder, finished[0])]
    for (words, first), (_, second) in zip(*both, strict=True):
        np.testing.assert_array_equal(first, second, err_msg=words)


def test_a_demo_of_photographs_from_the_command_line(photographs, tmp_path, capsys):
    command = [
        "demo",
        "--family",
        "tiny",
        "--iterations",
        "1",
        "--echo-iterations",
        "1",
        "--photos",
        str(photographs),
        "--class-noun",
        "coffee mug",
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    told = capsys.readouterr().err
    (page,) = tmp_path.glob("runs/demo-coffee-mug-*/index.html")
    assert f"open {page.relative_to(tmp_path)} in a browser" in told
    assert told.index("1/5 ") < told.index("5/5 ")
    read = Reader(page.read_text(encoding="utf-8"))
    assert len(read.images) == 3 + 6 * 4
    assert read.images[0][1].shape == (64, 64, 3)
    assert f"--photos {photographs} --class-noun 'coffee mug'" in read.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"concept": "halved-fish"}, "class_noun is 'mug' there and 'fish' here, photographs is "),
        ({"echo_iterations": 3}, "iterations is 2 there and 3 here"),
    ],
)
def test_another_demo_in_the_folder_is_left_alone_before_models_are_opened(finished, monkeypatch, change, words):
    folder, _ = finished
    monkeypatch.setattr(demo, "open_family", lambda sources: pytest.fail("models were opened"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = dataclasses.replace(SETTINGS, **change)
    with pytest.raises(InputError, match=re.escape(words)):
        demo.learn(choose(other, []), other, folder, lambda event: None, lambda line: pytest.fail(line))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_times_that_cannot_be_read_are_not_measured(finished, tmp_path):
    folder, _ = finished
    assert demo._Record.read(folder).seconds.keys() == {"distil", "echo"}
    for text in ("", "[]", '{"seconds": 3, "machine": ""}', '{"seconds": {"distil": null}, "machine": ""}'):
        (tmp_path / "demo.json").write_text(text)
        assert demo._Record.read(tmp_path).seconds == {}


def test_the_family_is_restored_after_a_demo(finished, monkeypatch):
    folder, _ = finished
    family = open_family(ModelSources(family="tiny"))
    before = {part: {n: t.clone() for n, t in tensors.items()} for part, tensors in family.loaded.items()}
    monkeypatch.setattr(demo, "open_family", lambda sources: family)
    demo.learn(choose(SETTINGS, []), SETTINGS, folder, lambda event: None, lambda line: None)
    for part, network in family.networks().items():
        after = network.state_dict()
        assert after.keys() == before[part].keys()
        assert all(torch.equal(before[part][n], after[n]) for n in after)
    assert family.text.placeholders == {}


def test_the_machine_is_named_in_words():
    assert "CPU cores" in demo.machine(torch.device("cpu"))
    assert torch.__version__ in demo.machine(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
        assert demo.machine(SimpleNamespace(type="cuda")).startswith("NVIDIA Something, ")
