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


def test_the_thumbnails_are_small_pictures():
    from PIL import Image

    for path in Path(FOLDER).glob("*.jpg"):
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            assert min(picture.size) >= 200
