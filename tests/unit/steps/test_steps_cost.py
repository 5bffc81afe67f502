"""Terms that are switched off, or not due in an iteration, cost nothing and change nothing."""

import pytest
import torch
from step_calls import ADVERSARIAL, ALIGNMENT, CRITICS, FULL, record_forwards, watched

from echodistill_core.training.build import needed_backbones
from echodistill_core.training.schedule import loss_schedule
from echodistill_core.training.steps import iterate


@pytest.mark.parametrize(
    ("off", "names_gone", "backbones", "teacher_calls", "student_decodes"),
    [
        ((), set(), CRITICS, 2, 2),
        (("teacher_weight",), {"recon_teacher", "grad_norm_teacher"}, CRITICS, 1, 2),
        (("alignment_weight",), ALIGNMENT, CRITICS, 1, 1),
        (("identity_weight", "mse_weight", "swd_weight"), ALIGNMENT, CRITICS, 1, 1),
        (("teacher_weight", "alignment_weight"), ALIGNMENT | {"recon_teacher", "grad_norm_teacher"}, CRITICS, 0, 1),
        (("adversarial_weight",), ADVERSARIAL, {"clip"}, 2, 2),
        (("adversarial_weight", "identity_weight"), ADVERSARIAL | {"identity"}, set(), 2, 2),
        (("identity_weight",), {"identity"}, CRITICS, 2, 2),
        (("mse_weight",), {"mse"}, CRITICS, 2, 2),
        (("swd_weight",), {"swd"}, CRITICS, 2, 2),
        (("identity_weight", "swd_weight"), {"identity", "swd"}, CRITICS, 2, 1),
        (("identity_weight", "swd_weight", "adversarial_weight"), ADVERSARIAL | {"identity", "swd"}, set(), 2, 0),
        (("dino_weight",), {"adv_dino", "critic_dino"}, {"dinov2", "clip"}, 2, 2),
        (("dinov2_weight",), {"adv_dinov2", "critic_dinov2"}, {"dino", "clip"}, 2, 2),
        (("clip_weight",), {"adv_clip", "critic_clip"}, CRITICS, 2, 2),
        (("clip_weight", "identity_weight"), {"adv_clip", "critic_clip", "identity"}, {"dino", "dinov2"}, 2, 2),
        (
            ("alignment_weight", "adversarial_weight"),
            ALIGNMENT | ADVERSARIAL | {"grad_norm_student"},
            set(),
            1,
            0,
        ),
    ],
)
def test_a_weight_of_zero_removes_the_term_and_its_cost(
    tiny_family, tiny_state, draw_batch, monkeypatch, off, names_gone, backbones, teacher_calls, student_decodes
):
    weights = dict.fromkeys(off, 0.0)
    without_teacher = teacher_calls == 0
    state = tiny_state(tiny_family(teacher=None) if without_teacher else None, **weights)
    assert set(needed_backbones(state.settings)) == set(state.backbones) == backbones
    batch, calls, decoded = draw_batch(state), [], []
    if not without_teacher:
        predict = type(state.family.teacher).predict
        monkeypatch.setattr(
            type(state.family.teacher),
            "predict",
            lambda self, *args: calls.append(self is state.family.teacher) or predict(self, *args),
        )
    decode = state.family.decode
    monkeypatch.setattr(state.family, "decode", lambda z: decoded.append(z) or decode(z))
    losses = iterate(state, batch)
    assert set(losses) == FULL - names_gone
    assert sum(calls) == teacher_calls
    assert len(decoded) == student_decodes
    assert all(torch.isfinite(v).all() and v.ndim == 0 and not v.requires_grad for v in losses.values())


def test_each_backbone_encodes_the_students_image_once(tiny_state, draw_batch, monkeypatch):
    # The student's pass and the critics' share its features: three backbones, twice each, and CLIP on the teacher's.
    state = tiny_state()
    seen = []
    record_forwards(monkeypatch, seen)
    iterate(state, draw_batch(state))
    assert sorted(seen) == ["clip"] * 3 + ["dino"] * 2 + ["dinov2"] * 2


def test_critics_are_neither_computed_nor_updated_in_iterations_without_them(
    tiny_state, draw_batch, monkeypatch, snapshot, changed
):
    """With critic_every 2, adversarial iterations have all terms; iteration 0 equals that of critic_every 1."""
    plain, state = tiny_state(), tiny_state(critic_every=2)
    seen = []
    record_forwards(monkeypatch, seen)
    for step in range(4):
        plain.step = state.step = step
        seen.clear()
        before = snapshot(state)
        losses = iterate(state, draw_batch(state))
        if step % 2 == 0:
            assert set(losses) == FULL
            assert sorted(seen) == ["clip"] * 3 + ["dino"] * 2 + ["dinov2"] * 2
            assert any(name.startswith("critics/") for name in changed(before, snapshot(state)))
        else:
            assert set(losses) == FULL - ADVERSARIAL
            assert seen == ["clip"] * 2  # of Eq. 2
            assert not any(name.startswith("critics/") for name in changed(before, snapshot(state)))
        if step == 0:
            assert losses == iterate(plain, draw_batch(plain))


def test_between_image_losses_only_the_latent_loss_is_computed(tiny_state, draw_batch, monkeypatch, snapshot, changed):
    """With image_every 3 and critic_every 2, iterations without images equal those of settings without image losses."""
    seeing = {"identity_weight": 0.0, "swd_weight": 0.0, "adversarial_weight": 0.0}
    blind, state = tiny_state(**seeing), tiny_state(image_every=3, critic_every=2)
    assert loss_schedule(state.settings).period == 6
    decode, decoded, seen = state.family.decode, [], []
    monkeypatch.setattr(state.family, "decode", lambda z: decoded.append(z) or decode(z))
    record_forwards(monkeypatch, seen)
    names = {}
    for state.step in range(7):
        decoded.clear()
        seen.clear()
        before = snapshot(state)
        names[state.step] = set(iterate(state, draw_batch(state)))
        assert len(decoded) == (2 if state.step % 3 == 0 else 0)
        assert (seen != []) is (state.step % 3 == 0)
        critics = any(name.startswith("critics/") for name in changed(before, snapshot(state)))
        assert critics is (state.step % 6 == 0)
    latents = FULL - ADVERSARIAL - {"identity", "swd", "alignment"}
    assert names == {i: FULL if i % 6 == 0 else FULL - ADVERSARIAL if i == 3 else latents for i in range(7)}

    # From the same start, an iteration between comparisons is one of the setting without the terms that see images.
    state = tiny_state(image_every=3)
    state.step = blind.step = 1
    losses, others = iterate(state, draw_batch(state)), iterate(blind, draw_batch(blind))
    assert losses == {name: loss for name, loss in others.items() if name != "alignment"}
    differing = changed(snapshot(state), snapshot(blind))
    assert not any(name.startswith(("student/", "teacher/", "rows/", "text/")) for name in differing)


def test_without_a_latent_term_the_student_is_not_updated_between_image_losses(
    tiny_state, draw_batch, snapshot, changed
):
    state = tiny_state(image_every=2, mse_weight=0.0)
    state.step = 1
    before = snapshot(state)
    assert set(iterate(state, draw_batch(state))) == {"recon_teacher", "grad_norm_teacher"}
    assert not any(name.startswith(("student/", "critics/")) for name in changed(before, snapshot(state)))


def test_without_alignment_the_student_is_not_updated_between_adversarial_iterations(
    tiny_state, draw_batch, monkeypatch
):
    state = tiny_state(alignment_weight=0.0, critic_every=2)
    with watched(monkeypatch, state.family.student) as calls:
        for state.step in range(2):
            iterate(state, draw_batch(state))
            assert len(calls) == 1


def test_without_image_losses_nothing_is_decoded_between_adversarial_iterations(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(critic_every=3, identity_weight=0.0, swd_weight=0.0)
    decode, decoded = state.family.decode, []
    monkeypatch.setattr(state.family, "decode", lambda z: decoded.append(z) or decode(z))
    for state.step in range(3):
        iterate(state, draw_batch(state))
    assert len(decoded) == 1
