"""Invalid input: the node raises a clear error with a remedy, before any training starts."""

from __future__ import annotations

import json

import graphs
import pytest
from comfy_server import RefusedError
from PIL import Image


def concept_only(info, **options):
    return {"concept": graphs.concept(info, **options), "show": graphs.node("PreviewImage", images=["concept", 1])}


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("../output", "input folder"),
        ("/etc", "input folder"),
        ("gone", "input folder"),
    ],
)
def test_a_folder_that_is_not_there_is_one_error_on_that_input(server, info, folder, words):
    with pytest.raises(RefusedError) as refused:
        server.run(concept_only(info, folder=folder))
    (errors,) = [node["errors"] for node in json.loads(str(refused.value))["node_errors"].values()]
    (error,) = errors
    assert error["extra_info"]["input_name"] == "folder"
    assert words in error["details"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folder": "mug", "noun": "  "}, "class_noun"),
        ({"folder": "mug", "placeholder": "dog"}, "already a word of the vocabulary"),
        ({"folder": "mug", "placeholder": "<a b>"}, "cannot be a word of a prompt"),
        ({}, "there are no photographs; connect an IMAGE"),
    ],
)
def test_a_mistake_is_said_on_the_node_and_raised_in_the_packs_name(server, info, options, words):
    outcome = server.run(concept_only(info, **options))
    assert outcome.error.startswith("EchoDistill: ")
    assert words in outcome.error
    (text,) = outcome.texts_on("concept")
    assert words in text
    assert text == outcome.error.removeprefix("EchoDistill: ").strip()


def test_a_folder_without_pictures(server, info, base):
    (base / "input" / "empty").mkdir()
    error = server.run(concept_only(info, folder="empty")).error
    assert "is empty" in error
    assert "put JPEG or PNG photographs into it" in error


def test_a_link_that_leads_out_of_the_input_folder_is_not_listed_and_not_read(server, info, base, tmp_path):
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "secret" / "a.png")
    (base / "input" / "door").symlink_to(tmp_path / "secret")
    listed = server.get("object_info/LoadReferenceImages")["LoadReferenceImages"]
    assert "door" not in str(listed)
    assert "mug" in str(listed)
    with pytest.raises(RefusedError, match="input folder"):
        server.run(concept_only(info, folder="door"))


def test_pictures_that_are_too_small(server, info, base):
    graph = concept_only(info)
    Image.new("RGB", (16, 16)).save(base / "input" / "small.png")
    graph["image"] = graphs.node("LoadImage", image="small.png")
    graph["concept"]["inputs"]["images"] = ["image", 0]
    error = server.run(graph).error
    assert "16x16" in error
    assert "expected at least" in error


def test_an_alpha_channel_is_laid_on_white_and_sizes_may_differ(server, info, base):
    Image.new("RGBA", (80, 64), (0, 0, 0, 0)).save(base / "input" / "clear.png")
    graph = concept_only(info, folder="mug")
    graph["image"] = graphs.node("LoadImage", image="clear.png")
    graph["concept"]["inputs"]["images"] = ["image", 0]
    outcome = server.run(graph)
    assert not outcome.error
    assert len(outcome.outputs["show"]["images"]) == 6


def test_student_and_teacher_are_told_apart_by_what_they_predict(server, info):
    """ModelSamplingDiscrete makes the teacher predict noise, as SD-Turbo does; the student predicts velocity."""
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph["eps"] = graphs.node("ModelSamplingDiscrete", model=["models", 1], sampling="eps", zsnr=False)
    graph["train"]["inputs"]["teacher"] = ["eps", 0]
    assert "student and teacher seem to be swapped: the student predicts velocity" in server.run(graph).error


@pytest.mark.parametrize("swapped", [False, True])
def test_student_and_teacher_are_told_apart_by_trial(server, info, swapped):
    """Both miniature models predict velocity with the same schedule, so only their predictions differ."""
    graph = graphs.training(info, iterations=1, preview_every=1, seed=21 + swapped)
    if swapped:
        graph["train"]["inputs"] |= {"student": ["models", 1], "teacher": ["models", 0]}
    outcome = server.run(graph)
    if not swapped:
        assert not outcome.error
        assert not any("swapped" in text for _, text in outcome.texts)
        return
    assert "student and teacher seem to be swapped" in outcome.error
    assert "check_roles" in outcome.error
    assert not any("1 of 1" in text for _, text in outcome.texts)  # nothing was trained


def test_swapped_roles_can_be_trained_on_purpose_and_stay_said(server, info):
    """The note stays on the node to the end, and the adapter says what happened when the right model refuses it."""
    graph = graphs.training(info, iterations=1, preview_every=1, seed=23, check_roles=False)
    graph["train"]["inputs"] |= {"student": ["models", 1], "teacher": ["models", 0]}
    graph |= graphs.sampled(info, ["train", 1])
    outcome = server.run(graph)
    texts = outcome.texts_on("train")
    assert "1 iterations" in texts[-1]
    assert "student and teacher seem to be swapped" in texts[-1]
    assert "in that training this model was the teacher" in outcome.error
    assert "swapped" in outcome.error


@pytest.mark.parametrize(
    ("sampling", "zsnr", "words"),
    [("v_prediction", True, "a noise schedule that is not Stable Diffusion's"), ("lcm", False, "is sampled as")],
)
def test_another_schedule_is_refused(server, info, sampling, zsnr, words):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph["other"] = graphs.node("ModelSamplingDiscrete", model=["models", 1], sampling=sampling, zsnr=zsnr)
    graph["train"]["inputs"]["teacher"] = ["other", 0]
    assert words in server.run(graph).error


def test_clip_skip_is_refused(server, info):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph["skip"] = graphs.node("CLIPSetLastLayer", clip=["models", 2], stop_at_clip_layer=-2)
    graph["train"]["inputs"]["clip"] = ["skip", 0]
    assert "CLIP Set Last Layer" in server.run(graph).error


def test_no_adapter_chosen(server, info):
    graph = {
        "models": graphs.MINIATURE,
        "adapter": graphs.load_adapter(info, ["models", 0], ["models", 2]),
        **graphs.stock_chain(["adapter", 0], ["adapter", 1], "a", 1),
    }
    assert "no adapter was chosen" in server.run(graph).error


def test_info_without_an_adapter_asks_for_one_and_fails_nothing(server, info):
    """Regression: template 3 failed completely before any adapter was saved."""
    graph = {"info": graphs.node("EchoAdapterInfo", **graphs.unset(info, "EchoAdapterInfo"))}
    outcome = server.run(graph)
    assert not outcome.error
    assert outcome.outputs["info"]["text"][0].startswith("choose an adapter")


def test_an_adapter_that_is_gone_since_the_list_was_made(server, info):
    graph = {
        "models": graphs.MINIATURE,
        "adapter": graphs.load_adapter(info, ["models", 0], ["models", 2], adapter_name="gone.safetensors"),
        **graphs.stock_chain(["adapter", 0], ["adapter", 1], "a", 1),
    }
    with pytest.raises(RefusedError, match="loras folders"):
        server.run(graph)


@pytest.mark.parametrize(
    "name", ["../escape", "a/../../escape", "/tmp/escape", "../../evil", "a\0b", ".", "a/..", "x" * 300]
)
def test_a_file_is_never_saved_elsewhere(server, info, base, name):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph["save"] = graphs.save_adapter(name)
    before = sorted(base.rglob("*"))
    outcome = server.run(graph)
    assert outcome.error.startswith("EchoDistill: filename_prefix")
    assert "output/loras" in outcome.error
    made = set(base.rglob("*")) - set(before)
    assert not [path for path in made if "escape" in path.name or "evil" in path.name or path.parent.name == "loras"]


def test_a_prompt_without_the_placeholder_warns_with_one_that_would_work(server, info):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph |= graphs.sampled(info, ["train", 1], prompt="photo of a mug on the beach")
    outcome = server.run(graph)
    assert not outcome.error
    (text,) = outcome.texts_on("sample")
    assert "photo of a <new1> mug on the beach" in text
    # A word that only contains the placeholder does not count as the placeholder.
    graph["concept"]["inputs"]["placeholder"] = "fidozq"
    for prompt, is_reminded in (("a fidozqmug", True), ("a fidozq mug", False), ("a FIDOZQ mug", False)):
        graph["sample"]["inputs"]["prompt"] = prompt
        texts = server.run(graph).texts_on("sample")
        assert bool(texts and texts[-1]) is is_reminded, prompt


def test_a_reminder_is_taken_away_by_a_run_that_needs_none(server, info):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph |= graphs.sampled(info, ["train", 1], prompt="photo of a mug in a box")
    assert server.run(graph).texts_on("sample")[-1]
    graph["sample"]["inputs"]["prompt"] = "photo of a <new1> mug in a box"
    assert server.run(graph).texts_on("sample") == [""]
    assert not server.run(graph).texts_on("sample")


def test_real_photographs_on_the_miniature_are_noted_on_the_node(server, info, base):
    (base / "input" / "dog").mkdir()
    for i in range(2):
        Image.new("RGB", (640, 480), (90 + i, 60, 30)).save(base / "input" / "dog" / f"{i}.jpg")
    (base / "input" / "dog" / "thumb.jpg").write_bytes(b"no picture")
    graph = graphs.training(info, folder="dog", noun="dog", iterations=1, preview_every=1)
    outcome = server.run(graph)
    assert not outcome.error
    last = dict(outcome.texts)
    assert "it cannot draw a dog" in last["train"]
    assert "thumb.jpg" in last["concept"]  # skipped files are listed on the node, not only in the log


@pytest.mark.parametrize("node", ["sample", "train"])
def test_a_vae_of_other_latents_is_named(server, info, node):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph |= graphs.sampled(info, ["train", 1])
    graph["pixels"] = graphs.node("VAELoader", vae_name="pixel_space")
    graph[node]["inputs"]["vae"] = ["pixels", 0]
    error = server.run(graph).error
    assert error.startswith("EchoDistill: this VAE (pixel_space) has 3 channels, but the ")
    assert "wants 8" in error


def test_an_error_leaves_the_queue_working(server, info):
    assert server.run(concept_only(info)).error
    assert not server.run(concept_only(info, folder="mug")).error


def test_losses_that_diverge_are_told_and_the_queue_works_on(server, info):
    graph = graphs.training(info, iterations=40, preview_every=40, student_lr=1.0, teacher_lr=1.0, seed=3)
    graph["train"]["inputs"]["grad_clip"] = 0.0
    outcome = server.run(graph)
    if outcome.error:
        assert outcome.error.startswith("EchoDistill: ")
        assert "Lower the learning rates" in outcome.error
    assert not server.run(concept_only(info, folder="mug")).error
