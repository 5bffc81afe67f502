"""Every committed workflow, as the front end would queue it, with the miniature in place of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import graphs
import pytest

from tools.templates import WORKFLOWS
from tools.workflows import FOLDER, prompt_of, with_miniature, workflow

SHORT = {"iterations": 2, "preview_every": 1}


@pytest.fixture(scope="module")
def adapter(server, info):
    """The name of a saved adapter, for the workflow that chooses one from the list."""
    graph = graphs.training(info, **SHORT)
    graph["save"] = graphs.node("SaveEchoAdapter", from_training=["train", 1], filename_prefix="flow", role="student")
    outcome = server.run(graph)
    assert not outcome.error
    return outcome.outputs["save"]["text"][0]


def committed(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_there_is_a_graph_for_every_committed_workflow():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_committed_workflow_fits_the_nodes_of_today(info, name):
    """Widgets are stored by position: a widget in a new place would turn iterations into a batch size."""
    saved, made = committed(name), workflow(WORKFLOWS[name][0](), info)
    for node, fresh in zip(saved["nodes"], made["nodes"], strict=True):
        assert node["type"] == fresh["type"]
        assert node["widgets_values"] == fresh["widgets_values"]
    assert saved["links"] == made["links"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_committed_workflow_has_a_note_and_runs(server, info, adapter, name):
    saved = committed(name)
    (note,) = [node for node in saved["nodes"] if node["type"] == "MarkdownNote"]
    assert len(note["widgets_values"][0]) > 100
    prompt = with_miniature(prompt_of(saved, info), adapter)
    for node in prompt.values():
        if node["class_type"] in ("EchoDistillTrain", "EchoStage"):
            node["inputs"] |= {key: value for key, value in SHORT.items() if key in node["inputs"]}
        if node["class_type"] == "EchoStage":
            node["inputs"]["pool_size"] = 2
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 3
    outcome = server.run(prompt)
    assert not outcome.error
    shown = [key for key, node in prompt.items() if node["class_type"] == "PreviewImage"]
    assert shown
    assert all(outcome.outputs[key]["images"] for key in shown)


def test_the_third_template_opens_what_the_first_one_saved(server, info, base):
    """As they are committed, on a server on which nothing else was saved under that name."""
    for path in (base / "output" / "loras").glob("toy_*"):
        path.unlink()
    first, _, third, *_ = WORKFLOWS
    prompt = prompt_of(committed(first), info)
    for node in prompt.values():
        if node["class_type"] == "EchoDistillTrain":
            node["inputs"] |= {**SHORT, "seed": 5}
    assert not server.run(prompt).error
    outcome = server.run(prompt_of(committed(third), info))
    assert not outcome.error
    texts = [output["text"][0] for output in outcome.outputs.values() if "text" in output]
    assert texts[0].startswith("prompt_stub")


@pytest.mark.parametrize("name", WORKFLOWS)
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1920, 1080)])
def test_every_template_opens_at_a_zoom_at_which_labels_are_drawn(name, width, height):
    """The front end fits a template into three quarters of its window, and below 8 / 14 it draws no labels."""
    nodes = committed(name)["nodes"]
    right, bottom = (max(node["pos"][i] + node["size"][i] for node in nodes) for i in (0, 1))
    left, top = (min(node["pos"][i] for node in nodes) for i in (0, 1))
    title = 30  # pixels of a node's title, above its position
    assert min(0.75 * width / (right - left), 0.75 * height / (bottom - top + title)) > 8 / 14


def test_the_thumbnails_are_small_pictures_of_their_own():
    from PIL import Image

    assert len({path.read_bytes() for path in FOLDER.glob("*.jpg")}) == len(WORKFLOWS)
    for path in Path(FOLDER).glob("*.jpg"):
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            assert min(picture.size) >= 200
