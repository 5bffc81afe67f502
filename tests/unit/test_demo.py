"""The demo: what it learns, its page as a browser would read it, and whole demos with the tiny family."""

import base64
import dataclasses
import io
import json
import re
import sys
import webbrowser
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from registries import replace_entry

from echodistill_core.cli import main, progress
from echodistill_core.demo import demo
from echodistill_core.demo.curves import curves, plot, smoothed
from echodistill_core.demo.page import Column, Page, duration, expectations, render
from echodistill_core.demo.scores import score
from echodistill_core.demo.settings import DemoSettings
from echodistill_core.demo.task import DemoTask, choose
from echodistill_core.errors import InputError
from echodistill_core.miniature.concepts import DEVELOPMENT, EVALUATION
from echodistill_core.miniature.judges import ATTRIBUTES
from echodistill_core.miniature.world import CONTEXTS
from echodistill_core.models.open import open_family
from echodistill_core.models.sources import FAMILIES, ModelSources
from echodistill_core.training.events import StepDone

QUICK = {"batch_size": 1, "swd_projections": 8, "log_every": 1, "preview_every": 0, "checkpoint_every": 2}
SETTINGS = DemoSettings(family="tiny", iterations=4, echo_iterations=2, device="cpu", open=False)
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Few and small iterations, and one tiny family, since every demo gives it back as it was."""
    family = open_family(ModelSources(family="tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "open_family", lambda sources: family)
        patch.setattr(demo, "RUN_SETTINGS", QUICK)
        replace_entry(patch, FAMILIES, "tiny", dataclasses.replace(FAMILIES["tiny"], echo_defaults={"pool_size": 2}))
        patch.setattr(demo, "TEACHER_STEPS", 2)
        yield


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo of the default concept that nothing interrupted, and what it told. Read only."""
    told = []
    folder = tmp_path_factory.mktemp("demos") / "mug"
    demo.learn(choose(SETTINGS, []), SETTINGS, folder, lambda event: None, told.append)
    return folder, told


class Reader(HTMLParser):
    """Reads a page: its text, its pictures, every address in it; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.addresses, self.names = [], "", [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.names.add(tag)
        found = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag == "img":
            data = found["src"].removeprefix("data:image/png;base64,")
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            self.images.append((found["alt"], np.array(picture)))

    def handle_startendtag(self, tag, attributes):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def bytes_of(image):
    """An image (3, H, W) in [-1, 1] as the nearest of 256 values, (H, W, 3)."""
    return np.rint((np.asarray(image, np.float64) + 1) / 2 * 255).astype(np.uint8).transpose(1, 2, 0)


def a_page(task=None, **changes):
    task = task or choose(DemoSettings(), [])
    generator = torch.Generator().manual_seed(1)

    def pictures(count):
        return torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1

    columns = tuple(Column(name, "1 step", pictures(6), {}) for name in ("before", "after"))
    page = Page(
        task=task,
        placeholder="<new1>",
        family="miniature",
        folder=Path("runs/my demo"),
        photographs=pictures(5),
        columns=columns,
        losses={"distil": [{"step": 1, "recon_teacher": 1.0}], "echo": []},
        iterations={"distil": 2, "echo": 1},
        seconds={"distil": 61.0, "echo": 4.0},
        machine="a & b",
    )
    return dataclasses.replace(page, **changes)


# What is learned


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
def test_the_page_opens_only_where_someone_can_see_it(monkeypatch, capsys, terminal, display, flag, opens):
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


# The page


def test_the_page_holds_every_picture_as_it_is_and_needs_nothing_else():
    page = a_page()
    read = Reader(render(page))
    assert all(address.startswith("data:image/png;base64,") for address in read.addresses)
    assert not re.search(r"url\((?!#)", render(page))
    assert not read.names & {"script", "link", "iframe", "object"}
    expected = list(page.photographs)
    # Row by row: a prompt's pictures side by side.
    expected += [column.images[i] for i in range(6) for column in page.columns]
    assert len(read.images) == len(expected)
    for (_, found), wanted in zip(read.images, expected, strict=True):
        np.testing.assert_array_equal(found, bytes_of(wanted))
    prompts = page.task.prompts("<new1>")
    assert [words for words, _ in read.images[5:7]] == [f"before: {prompts[0]}", f"after: {prompts[0]}"]
    assert read.text.count("a place that no photograph shows") == 3
    assert "1 min 05 s in all" in read.text
    assert "echodistill sample 'runs/my demo' --prompt \"a <new1> mug on the grass\"" in read.text


def test_what_users_write_is_text_on_the_page(photographs):
    task = DemoTask("your <script>x</script>", "<b>&", [], photos=("my photos",))
    read = Reader(render(a_page(task)))
    assert "script" not in read.names
    assert "your <script>x</script>" in read.text
    assert "a <new1> <b>& on the beach" in read.text
    assert "--photos 'my photos' --class-noun '<b>&'" in read.text


def test_scores_stand_in_the_table_and_only_where_they_are_known():
    page = a_page()
    assert "Scores" not in Reader(render(page)).text
    scored = [dataclasses.replace(c, scores={"dino": 0.1234 + i}) for i, c in enumerate(page.columns)]
    text = Reader(render(dataclasses.replace(page, columns=tuple(scored)))).text
    assert "DINObefore0.123after1.123" in re.sub(r"\s", "", text)
    assert "CLIP-T" not in text


def test_the_page_says_honestly_what_to_expect(photographs):
    toy, own = choose(DemoSettings(), []), choose(DemoSettings(class_noun="backpack"), [str(photographs)])
    known = dataclasses.replace(own, class_noun="cat")
    assert "random weights" in " ".join(expectations(a_page(toy, family="tiny")))
    assert "photographs" not in " ".join(expectations(a_page(toy)))
    assert "out of its reach" in " ".join(expectations(a_page(own)))
    assert "“backpack”" in " ".join(expectations(a_page(own)))
    assert "none of its training captions" not in " ".join(expectations(a_page(known)))


def test_times_of_what_nobody_measured_are_not_added_up():
    every = dict.fromkeys(("open", "before", "distil", "echo", "after", "one_step", "teacher", "scores"), 1.5)
    text = Reader(render(a_page(seconds={**every, "teacher": 15.0}))).text.replace("\n", "")
    assert "scores1.5 stogether25.5 s" in text
    assert "250 ms in one step and 2.5 s with the teacher: 10 times" in text
    text = Reader(render(a_page(seconds={**every, "echo": None}))).text.replace("\n", "")
    assert "not measured" in text
    assert "scores1.5 stogether" not in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0347, "35 ms"),
        (1.04, "1.0 s"),
        (59.9, "59.9 s"),
        (65.2, "1 min 05 s"),
        (119.8, "2 min 00 s"),
        (None, "not measured"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_smoothing_is_the_mean_of_the_neighbours_that_exist():
    values = np.random.default_rng(0).normal(size=23)
    for window in (1, 2, 5, 99):
        ones = np.ones(2 * (window // 2) + 1)
        total = np.convolve(values, ones, "full")[window // 2 :][: len(values)]
        count = np.convolve(np.ones_like(values), ones, "full")[window // 2 :][: len(values)]
        np.testing.assert_allclose(smoothed(values.tolist(), window), total / count, atol=1e-12)


def test_a_curve_is_drawn_for_each_logged_term():
    losses = {
        "distil": [{"step": 1, "recon_teacher": 2.0}, {"step": 3, "recon_teacher": 4.0}],
        "echo": [{"step": 1, "recon_teacher": 3.0, "identity": 0.5, "mse": float("nan")}],
    }
    drawn = curves(losses, {"distil": 3, "echo": 1})
    assert [title for title, _ in drawn] == ["teacher's error (Eq. 1)", "identity (Eq. 2)"]
    for title, svg in drawn:
        assert ElementTree.fromstring(svg).get("aria-label").startswith(title)
        assert "var(--ours)" in svg
    # The labels of the axis are the least and the greatest value.
    assert {"2", "4"} <= set(ElementTree.fromstring(drawn[0][1]).itertext())
    assert curves({"distil": [], "echo": []}, {"distil": 3, "echo": 1}) == []
    assert curves(losses, {"distil": 3, "echo": 1}) == drawn


def test_a_curve_goes_through_its_points_with_the_stages_in_turn():
    axes = plot("teacher", [[(1, 2.0), (3, 4.0)], [(4, 3.0)]], [0, 3], 4).axes[0]
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert lines[0] == [[1, 2], [3, 4]]
    assert [[4, 3]] in lines
    assert [[3, 0], [3, 1]] in lines  # where the echo begins
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 4), (2, 4))


# Scores


class SayingJudges:
    """Judges that see in a picture's first pixel which of some fixed features and attributes it has."""

    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])

    def identity(self, images):
        return self.features[images[:, 0, 0, 0].long()]

    image_text_image = identity

    def image_text_text(self, prompts):
        assert not any("<" in prompt for prompt in prompts)
        return torch.tensor([[1.0, 0.0]]).expand(len(prompts), -1)

    def attributes(self, images):
        values = {"shape": "mug", "color": "purple", "second": "orange", "pattern": "plain", "emblem": "cross"}
        seen = {n: torch.full((len(images),), ATTRIBUTES[n][0].index(v)) for n, v in values.items()}
        return {**seen, "context": torch.full((len(images),), ATTRIBUTES["context"][0].index("grass"))}


def test_scores_by_hand(photographs):
    task = choose(DemoSettings(), [])
    images = torch.zeros(6, 3, 8, 8)
    images[3:5] = 1.0
    images[5] = 2.0
    references = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    found = score(SayingJudges(), task, images, task.prompts(), references)
    half = 0.5**0.5
    assert found["clip_t"] == pytest.approx((3 + half) / 6)
    # Each of the first five meets itself and its opposite, the last two references at 45 degrees.
    assert found["dino"] == found["clip_i"] == pytest.approx((5 * 0.5 + half) / 6)
    assert found["attributes"] == pytest.approx(4 / 5)  # the pattern is wrong; two colours have no order
    assert task.contexts.count("grass") == 1
    assert found["context"] == pytest.approx(1 / 6)
    own = choose(DemoSettings(class_noun="dog"), [str(photographs)])
    found = score(SayingJudges(), own, images, own.prompts(), references)
    assert set(found) == {"clip_t", "clip_i", "dino"}


# Whole demos


def test_what_suits_the_family_is_what_a_demo_trains_with(monkeypatch):
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
        ({"seed": 1}, "holds another run: seed is 0 there and 1 here; "),
        ({"concept": "halved-fish"}, "holds another run: class_noun is 'mug' there and 'fish' here, photographs is "),
        ({"echo_iterations": 3}, "echoing stage of other settings: iterations is 2 there and 3 here"),
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


def test_the_family_is_given_back_as_it_was_opened(finished, monkeypatch):
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
