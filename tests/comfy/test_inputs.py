"""Bad input: told in the node's own error, before anything heavy starts, with what to do."""

from __future__ import annotations

import graphs
import pytest
from comfy_server import RefusedError
from PIL import Image


def concept_only(info, **options):
    values = {**graphs.unset(info, "LoadReferenceImages"), "class_noun": "mug", **options}
    return {
        "concept": graphs.node("LoadReferenceImages", **values),
        "show": graphs.node("PreviewImage", images=["concept", 1]),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folder": "mug", "class_noun": "  "}, "class_noun is empty"),
        ({"folder": "mug", "placeholder": "dog"}, "already a word of the vocabulary"),
        ({"folder": "mug", "placeholder": "<a b>"}, "cannot be a word of a prompt"),
        ({"folder": "../output"}, "is no folder of ComfyUI's input folder"),
        ({"folder": "/etc"}, "Other places of the disk are not read"),
        ({"folder": "gone"}, "put the photographs into a folder there"),
    ],
)
def test_what_a_concept_needs_is_told_before_it_runs(server, info, options, words):
    with pytest.raises(RefusedError) as refused:
        server.run(concept_only(info, **options))
    assert words in str(refused.value)


def test_no_photographs(server, info):
    assert "there are no photographs; connect an IMAGE" in server.run(concept_only(info)).error


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
    with pytest.raises(RefusedError, match="is no folder of ComfyUI's input folder"):
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
    outcome = server.run(graph)
    assert not outcome.error
    assert any("are the two swapped?" in text for _, text in outcome.texts)


@pytest.mark.parametrize("swapped", [False, True])
def test_student_and_teacher_are_told_apart_by_trial(server, info, swapped):
    """Both of the miniature predict velocity under one schedule: only what they draw tells which is which."""
    graph = graphs.training(info, iterations=1, preview_every=1, seed=21 + swapped)
    if swapped:
        graph["train"]["inputs"] |= {"student": ["models", 1], "teacher": ["models", 0]}
    outcome = server.run(graph)
    assert not outcome.error
    assert any("are the two swapped?" in text for _, text in outcome.texts) is swapped


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
    assert "connect the CLIP without that node" in server.run(graph).error


def test_no_adapter_chosen(server, info):
    graph = {
        "models": graphs.MINIATURE,
        "adapter": graphs.node(
            "LoadEchoAdapter",
            base_model=["models", 0],
            base_clip=["models", 2],
            **graphs.unset(info, "LoadEchoAdapter"),
        ),
        **graphs.stock_chain(["adapter", 0], ["adapter", 1], "a", 1),
    }
    assert "no adapter was chosen" in server.run(graph).error


def test_an_adapter_that_is_gone_since_the_list_was_made(server, info):
    graph = {
        "models": graphs.MINIATURE,
        "adapter": graphs.node(
            "LoadEchoAdapter",
            base_model=["models", 0],
            base_clip=["models", 2],
            **{**graphs.unset(info, "LoadEchoAdapter"), "adapter_name": "gone.safetensors"},
        ),
        **graphs.stock_chain(["adapter", 0], ["adapter", 1], "a", 1),
    }
    with pytest.raises(RefusedError, match="moved or deleted since the list was made"):
        server.run(graph)


@pytest.mark.parametrize("name", ["../escape", "a/../../escape"])
def test_a_file_is_never_saved_elsewhere(server, info, base, name):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph["save"] = graphs.node("SaveEchoAdapter", from_training=["train", 1], filename_prefix=name, role="student")
    outcome = server.run(graph)
    assert outcome.error
    assert not list(base.rglob("*escape*"))


def test_a_prompt_without_the_placeholder_warns_with_one_that_would_work(server, info):
    graph = graphs.training(info, iterations=1, preview_every=1)
    graph |= graphs.sampled(info, ["train", 1], prompt="photo of a mug on the beach")
    outcome = server.run(graph)
    assert not outcome.error
    (text,) = [text for node, text in outcome.texts if node == "sample"]
    assert "photo of a <new1> mug on the beach" in text


def test_an_error_leaves_the_queue_working(server, info):
    assert server.run(concept_only(info)).error
    assert not server.run(concept_only(info, folder="mug")).error


def test_losses_that_diverge_are_told_and_the_queue_works_on(server, info):
    graph = graphs.training(info, iterations=40, preview_every=40, student_lr=1.0, teacher_lr=1.0, seed=3)
    graph["train"]["inputs"]["grad_clip"] = 0.0
    outcome = server.run(graph)
    if outcome.error:
        assert "DivergedError" in outcome.error
        assert "Lower the learning rates" in outcome.error
    assert not server.run(concept_only(info, folder="mug")).error
