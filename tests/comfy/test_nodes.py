"""The nodes as ComfyUI describes them: sockets, widgets, tooltips, help pages, languages, templates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from echodistill_core.settings import EchoSettings, TrainSettings

PACK = Path(__file__).parents[2]
NODES = {
    "LoadReferenceImages": ["ECHO_CONCEPT", "IMAGE"],
    "EchoDistillTrain": ["ECHO_RUN", "ECHO_ADAPTER", "IMAGE", "IMAGE"],
    "EchoStage": ["ECHO_RUN", "ECHO_ADAPTER", "IMAGE", "IMAGE"],
    "LoadEchoAdapter": ["MODEL", "CLIP", "STRING", "ECHO_ADAPTER"],
    "OneStepSample": ["IMAGE", "LATENT"],
    "LoadMiniature": ["MODEL", "MODEL", "CLIP", "VAE", "IMAGE"],
    "SaveEchoAdapter": ["STRING"],
    "EchoAdapterInfo": ["STRING"],
    "ScoreEcho": ["STRING", "FLOAT", "FLOAT", "FLOAT"],
}


def inputs(description):
    return {**description["input"].get("required", {}), **description["input"].get("optional", {})}


@pytest.mark.parametrize("name", NODES)
def test_every_node_is_there_with_its_outputs(info, name):
    assert info[name]["output"] == NODES[name]
    assert info[name]["category"] == "EchoDistill"
    assert info[name]["description"]


@pytest.mark.parametrize("name", NODES)
def test_every_input_and_output_has_a_tooltip(info, name):
    for input_name, (_, *options) in inputs(info[name]).items():
        assert options, f"{name}.{input_name}"
        assert options[0].get("tooltip"), f"{name}.{input_name}"
    assert all(info[name]["output_tooltips"])


def test_the_server_names_no_failed_import(server):
    assert "IMPORT FAILED" not in server.text()
    assert "Error while calling comfy_entrypoint" not in server.text()


@pytest.mark.parametrize(
    ("node", "settings", "elsewhere"),
    [
        ("EchoDistillTrain", TrainSettings, {"device", "log_every", "extra_losses", "extra_critics"}),
        ("EchoStage", EchoSettings, set()),
    ],
)
def test_every_setting_has_a_widget(info, node, settings, elsewhere):
    concept = {"class_noun", "placeholder", "crop"} if settings is TrainSettings else set()
    widgets = set(inputs(info[node]))
    assert {f.name for f in dataclasses.fields(settings)} - elsewhere - concept <= widgets
    if concept:
        assert concept <= set(inputs(info["LoadReferenceImages"]))


def test_the_seed_of_a_training_stays_what_it_is(info):
    """A seed that changes after every prompt would start a new training each time."""
    assert inputs(info["EchoDistillTrain"])["seed"][1]["control_after_generate"] is False


def test_defaults_and_ranges_are_the_settings_own(info):
    widgets = inputs(info["EchoDistillTrain"])
    for field in dataclasses.fields(TrainSettings):
        if field.name in ("iterations", "batch_size", "seed", "preset"):
            assert widgets[field.name][1]["default"] == field.default
    assert widgets["guidance_scale"][1]["max"] == 50.0


@pytest.mark.parametrize(
    ("term", "node"),
    [
        ("dreambooth", "EchoDistillTrain"),
        ("personalize", "EchoDistillTrain"),
        ("textual inversion", "EchoDistillTrain"),
        ("lora", "LoadEchoAdapter"),
        ("subject", "LoadReferenceImages"),
        ("turbo", "OneStepSample"),
    ],
)
def test_the_words_that_people_search_for_find_the_nodes(info, term, node):
    if "search_aliases" not in info["KSampler"]:
        pytest.skip("this ComfyUI's schema knows no search_aliases")
    assert term in info[node]["search_aliases"]


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_fits_into_its_panel(server, name):
    """The panel is 380 pixels wide: a table of four columns leaves seven letters for the text."""
    page = server.fetch(f"extensions/ComfyUI-EchoDistill/docs/{name}.md").decode()
    assert not [line for line in page.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", NODES)
def test_every_node_has_a_help_page_that_the_front_end_finds(server, info, name):
    page = server.fetch(f"extensions/ComfyUI-EchoDistill/docs/{name}.md").decode()
    described = {(o[0] if o else {}).get("display_name", n) for n, (_, *o) in inputs(info[name]).items()}
    for word in {*described, *info[name]["output_name"]}:
        advanced = any(word == n and o and o[0].get("advanced") for n, (_, *o) in inputs(info[name]).items())
        assert advanced or f"`{word}`" in page, f"{name}: {word}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_input_and_output_has_a_name_in_the_language(server, info, language):
    words = server.get("i18n")[language]["nodeDefs"]
    for name in NODES:
        entry = words[name]
        assert entry["display_name"]
        assert entry["description"]
        for input_name in inputs(info[name]):
            assert entry["inputs"][input_name]["name"], f"{name}.{input_name}"
            assert entry["inputs"][input_name]["tooltip"], f"{name}.{input_name}"
        for i in range(len(info[name]["output"])):
            assert entry["outputs"][str(i)]["name"], f"{name}, output {i}"


def test_workflows_are_listed_with_a_thumbnail_each(server):
    listed = server.get("workflow_templates")["ComfyUI-EchoDistill"]
    there = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
    assert sorted(listed) == there
    assert len(there) >= 6
    for name in there:
        json.loads(server.fetch(f"api/workflow_templates/ComfyUI-EchoDistill/{quote(name)}.json"))
        assert (PACK / "workflows" / f"{name}.jpg").is_file()
