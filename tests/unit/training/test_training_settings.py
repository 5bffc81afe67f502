"""Ablations as settings of whole runs, and settings that are refused before anything is computed."""

from dataclasses import replace

import pytest
import torch
from run_files import stage_files

from echodistill_core.adapter.file import read_adapter
from echodistill_core.concept.images import square_images
from echodistill_core.concept.photographs import load_photographs
from echodistill_core.errors import InputError
from echodistill_core.tensorfile import read_tensors
from echodistill_core.training.build import new_state

# --- ablations as settings, through the whole run -------------------------------------------------


def test_one_photograph_only(train_tiny, photographs, tmp_path):
    run = train_tiny(tmp_path / "run", max_photographs=1)
    assert run.record["photographs"] == ["0.png"]
    images = square_images(load_photographs([photographs / "0.png"]), 64, "center")
    assert torch.equal(run.photographs().pixels, images.pixels)
    # And it is the run of a folder with that photograph alone.
    alone = train_tiny(tmp_path / "alone", photographs=[photographs / "0.png"], max_photographs=1)
    assert stage_files(alone) == stage_files(run)


def test_without_a_teacher_only_the_student_and_its_token_learn(tiny_family, train_tiny, tmp_path):
    run = train_tiny(tmp_path / "run", tiny_family(teacher=None), teacher_weight=0.0, alignment_weight=0.0)
    assert set(stage_files(run)) == {"checkpoint.safetensors", "student.safetensors"}
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    start = tiny_family().text.noun_embeddings("dog", 1)
    assert not torch.equal(adapter.token_embeddings, start)
    assert set(run.read_log("distil")[0]) == {
        *("step", "grad_norm_student", "grad_norm_critics"),
        *(f"{what}_{role}" for what in ("adv", "critic") for role in ("dino", "dinov2", "clip")),
    }


def test_a_text_encoder_of_its_own_gives_each_adapter_its_rows(train_tiny, tmp_path):
    shared, own = (
        train_tiny(tmp_path / name, share_text_encoder=flag) for name, flag in (("shared", True), ("own", False))
    )
    rows = {
        (name, role): read_adapter(run.path("distil", f"{role}.safetensors")).token_embeddings
        for name, run in (("shared", shared), ("own", own))
        for role in ("student", "teacher")
    }
    assert torch.equal(rows["shared", "student"], rows["shared", "teacher"])
    assert not torch.equal(rows["own", "student"], rows["own", "teacher"])
    assert torch.equal(rows["own", "teacher"], rows["shared", "teacher"])  # the teacher's rows are unaffected
    keys = [n for n in read_tensors(own.path("distil", "checkpoint.safetensors")) if n.startswith("rows/")]
    assert sorted(keys) == ["rows/student", "rows/teacher"]


def test_baselines_are_the_same_loop_with_one_term(train_tiny, tmp_path):
    run = train_tiny(
        tmp_path / "run",
        trainable="token",
        teacher_weight=0.0,
        alignment_weight=0.0,
        adversarial_weight=0.0,
        student_reconstruction_weight=1.0,
    )
    adapter = read_adapter(run.path("distil", "student.safetensors"))
    assert adapter.all_deltas() == {}
    assert set(run.read_log("distil")[0]) == {"step", "recon_student", "grad_norm_student"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_several_rows_start_at_the_mean_of_the_noun(tiny_family, tiny_state, precision):
    """The mean of the table as loaded, also where the networks are then cast to bf16."""
    table = tiny_family().text.table.clone()
    state = tiny_state(vectors=3, class_noun="coffee mug", precision=precision)
    tokenizer = state.family.text.tokenizer
    ids = tokenizer("coffee mug", add_special_tokens=False).input_ids
    assert len(ids) == 2
    expected = (table[ids[0]] + table[ids[1]]) / 2
    torch.testing.assert_close(state.trainables.token_embeddings["teacher"].data, expected.expand(3, -1))
    assert state.trainables.token_embeddings["student"] is state.trainables.token_embeddings["teacher"]


# --- what is refused before anything is computed --------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"class_noun": "  "}, "class_noun is empty"),
        ({"resolution": 60}, "resolution is 60; expected 64 or more"),
        ({"resolution": 68}, "resolution is 68; .*multiple of 8"),
        ({"placeholder": "dog"}, "already a word"),
        ({"device": "quantum"}, "device 'quantum' cannot be used"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(train_tiny, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        train_tiny(tmp_path / "run", **overrides)
    assert not (tmp_path / "run" / "distil").exists()


def test_a_teacher_or_backbone_that_is_missing_is_named(tiny_family, quick_settings):
    family = tiny_family()
    family.text = family.text.with_placeholders({"<new1>": 1})
    with pytest.raises(InputError, match="need the backbone clip"):
        new_state(family, {}, quick_settings())
    with pytest.raises(InputError, match="need a teacher"):
        new_state(replace(family, teacher=None), {}, quick_settings())


@pytest.mark.parametrize(
    "off",
    [
        {"trainable": "kv"},
        {"trainable": "token", "student_reconstruction_weight": 0.0},
        # The student's own matrices are frozen, and its rows are no token that learns.
        {"trainable": "full", "adversarial_weight": 1.0, "dino_weight": 0.0, "dinov2_weight": 0.0, "clip_weight": 0.0},
    ],
)
def test_a_run_in_which_nothing_would_learn_is_refused(tiny_state, off):
    with pytest.raises(InputError, match=f"trainable {off['trainable']}"):
        tiny_state(**{"teacher_weight": 0.0, "alignment_weight": 0.0, "adversarial_weight": 0.0, **off})


def test_a_token_alone_is_trained_by_the_teacher_or_else_by_the_student(tiny_state):
    assert len(tiny_state(trainable="token", teacher_weight=0.0).trainables.parameters("student")) == 1
    state = tiny_state(trainable="token")
    assert (len(state.trainables.parameters("student")), len(state.trainables.parameters("teacher"))) == (0, 1)
