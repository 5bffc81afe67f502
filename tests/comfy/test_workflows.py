"""Every committed workflow, queued as the front end does, with the miniature instead of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import graphs
import pytest

from tools.workflows import FOLDER, TOY, WORKFLOWS, prompt_of, refit, thumbnail_nodes, widget_names, with_miniature

SHORT = {"iterations": 2, "preview_every": 1}


@pytest.fixture(scope="module")
def adapter(server, info):
    """The name of a saved adapter, for the workflow that chooses one from the list."""
    graph = graphs.training(info, **SHORT)
    graph["save"] = graphs.save_adapter("flow")
    outcome = server.run(graph)
    assert not outcome.error
    return outcome.outputs["save"]["text"][0]


def committed(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


SIDE = {"width": 64, "height": 64, "batch_size": 4}
BEACH = "photo of a <new1> mug on the beach"
MUG = ("LoadReferenceImages", {"class_noun": "mug"})
TRAIN = ("EchoDistillTrain", TOY)
SAMPLE = ("OneStepSample", {"prompt": BEACH, **SIDE})
SCORE = ("ScoreEcho", {"prompt": BEACH, "protocol": "miniature"})
# The widgets with other values than their defaults, in the order of the nodes.
CHANGED = {
    "1 Learn a toy without downloads": [MUG, TRAIN, ("SaveEchoAdapter", {"filename_prefix": "toy"}), SAMPLE],
    "2 Your photographs with SD-Turbo": [
        ("CheckpointLoaderSimple", {"ckpt_name": "sd_turbo.safetensors"}),
        ("CheckpointLoaderSimple", {"ckpt_name": "v2-1_768-ema-pruned.safetensors"}),
        ("SaveEchoAdapter", {"filename_prefix": "dog"}),
    ],
    "3 Sample a saved adapter": [
        ("LoadEchoAdapter", {"adapter_name": "toy_00001_student.safetensors"}),
        ("OneStepSample", {"prompt": "photo of a <new1> mug in the snow", **SIDE}),
    ],
    "4 Two subjects on one model": [
        ("LoadMiniature", {"toy": "striped-cat"}),
        MUG,
        TRAIN,
        ("LoadReferenceImages", {"class_noun": "cat", "placeholder": "<new2>"}),
        TRAIN,
        SAMPLE,
        ("OneStepSample", {"prompt": "photo of a <new2> cat on the beach", **SIDE}),
        ("OneStepSample", {"prompt": "photo of a <new1> mug and a <new2> cat", **SIDE}),
    ],
    "5 Before and after the echo": [MUG, TRAIN, ("EchoStage", {"iterations": 80}), SAMPLE, SCORE, SAMPLE, SCORE],
    "6 Teacher and student": [
        MUG,
        TRAIN,
        SAMPLE,
        ("LoadEchoAdapter", {"role": "teacher"}),
        ("CLIPTextEncode", {"text": BEACH}),
        ("EmptyLatentImage", SIDE),
        ("KSampler", {"steps": 25, "cfg": 3.0, "sampler_name": "ddim", "scheduler": "ddim_uniform"}),
    ],
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_widgets_of_a_workflow_have_their_defaults_except_for_the_listed_ones(info, name):
    """Values are stored by position: with moved widgets, iterations would be read as batch size."""
    changed = []
    for node in committed(name)["nodes"]:
        if node["type"] != "MarkdownNote":
            values = iter(node["widgets_values"])
            found = {}
            for widget, default, is_controlled in widget_names(info[node["type"]]):
                if (value := next(values)) != default:
                    found[widget] = value
                assert not is_controlled or next(values) == "fixed"
            assert not list(values), node["type"]
            changed += [(node["type"], found)] if found else []
    assert changed == CHANGED[name]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_links_of_a_workflow_join_sockets_that_exist_and_have_the_same_type(info, name):
    saved = committed(name)
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert saved["links"]
    for link, origin, output, target, socket, kind in saved["links"]:
        source, sink = nodes[origin], nodes[target]
        assert link in source["outputs"][output]["links"]
        assert sink["inputs"][socket]["link"] == link
        described = info[sink["type"]]["input"]
        name_of_input = sink["inputs"][socket]["name"]
        (expected, *_) = {**described["required"], **described.get("optional", {})}[name_of_input]
        assert info[source["type"]]["output"][output] == expected == kind
    for node in saved["nodes"]:
        required = info.get(node["type"], {"input": {}})["input"].get("required", {})
        linked = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        widgets = {widget for widget, *_ in widget_names(info[node["type"]])} if required else set()
        assert required.keys() - widgets <= linked, node["type"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_refit_changes_nothing_while_the_widgets_are_the_same(info, name):
    saved = committed(name)
    refit(saved, json.loads((FOLDER.parent / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")), info)
    assert saved == committed(name)


def test_refit_moves_values_to_the_new_positions_of_their_widgets():
    """One widget is removed, one is added, and the seed keeps its control value."""
    node = {"type": "N", "inputs": [{"name": "model", "link": 1}], "widgets_values": [9, 5, "fixed", "b"]}
    before = {"N": {"inputs": {"model": {}, "gone": {}, "seed": {}, "mode": {}}}}
    inputs = {
        "model": ["MODEL"],
        "mode": [["a", "b"]],
        "new": ["FLOAT", {"default": 0.5}],
        "seed": ["INT", {"default": 0, "control_after_generate": True}],
    }
    info = {"N": {"input": {"required": inputs}}}
    refit({"nodes": [node]}, before, info)
    assert node["widgets_values"] == ["b", 0.5, 5, "fixed"]
    with pytest.raises(ValueError, match=r"tools\.locales"):
        refit({"nodes": [node]}, {"N": {"inputs": {"mode": {}}}}, info)


def test_a_thumbnail_shows_previews_and_the_users_photographs():
    shown = [[nodes[key]["type"] for key in thumbnail_nodes(saved)] for saved, nodes in map(with_nodes, WORKFLOWS)]
    preview = "PreviewImage"
    expected = [[preview], ["LoadReferenceImages", preview], [preview], [preview] * 3, [preview] * 2, [preview] * 2]
    assert shown == expected


def with_nodes(name: str) -> tuple[dict, dict]:
    saved = committed(name)
    return saved, {str(node["id"]): node for node in saved["nodes"]}


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
