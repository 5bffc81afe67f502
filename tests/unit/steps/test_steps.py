"""Algorithm 1's three steps: the tensors that each of them changes, and the token they share."""

import pytest
import torch
from step_calls import STUDENT_TERMS, keys_and_values, only, watched

from echodistill_core.models.architectures import TINY
from echodistill_core.training.steps import critic_step, iterate, student_step, teacher_step

# --- which tensors a step changes -----------------------------------------------------------------


def test_tiny_family_has_keys_and_values_to_train(tiny_state):
    state = tiny_state()
    for role in ("teacher", "student"):
        assert len(keys_and_values(state, role)) == 2 * 7
        assert {f"{role}/{n}" for n in state.trainables.weights[role].parameters} == keys_and_values(state, role)


@pytest.mark.parametrize("shared", [True, False])
def test_each_step_changes_its_own_tensors_and_no_bit_of_another(tiny_state, draw_batch, snapshot, changed, shared):
    state = tiny_state(share_text_encoder=shared, weight_decay=0.0)
    rows = {"rows/teacher", "rows/student"}
    for step in range(2):
        batch = draw_batch(state, step)
        before = snapshot(state)
        teacher_step(state, batch)
        after_teacher = snapshot(state)
        _, made = student_step(state, batch)
        after_student = snapshot(state)
        critic_step(state, batch, made)
        after_critics = snapshot(state)
        own_row = rows if shared else {"rows/teacher"}
        assert changed(before, after_teacher) == keys_and_values(state, "teacher") | own_row
        own_row = set() if shared else {"rows/student"}
        assert changed(after_teacher, after_student) == keys_and_values(state, "student") | own_row
        heads = {f"critics/{n}" for n in state.trainables.critics.state_dict()}
        assert changed(after_student, after_critics) == heads
        assert len(heads) == 3 * 4


@pytest.mark.parametrize("term", STUDENT_TERMS)
def test_each_term_alone_reaches_every_student_key_and_value_only(tiny_state, draw_batch, snapshot, changed, term):
    # teacher_weight keeps the token the teacher's; teacher_step itself is not called here.
    state = tiny_state(**only(teacher_weight=1.0, **STUDENT_TERMS[term]))
    batch, before = draw_batch(state), snapshot(state)
    losses, _ = student_step(state, batch)
    assert term in losses
    assert changed(before, snapshot(state)) == keys_and_values(state, "student")
    assert all(p.grad is None for p in state.trainables.parameters("student"))
    family = state.family
    for module in (family.student.unet, family.teacher.unet, family.text, family.vae, *state.backbones.values()):
        assert all(p.grad is None for p in module.parameters())
    assert all(
        p.grad is None for p in [*state.trainables.token_embeddings.values(), *state.trainables.critics.parameters()]
    )


@pytest.mark.parametrize("term", sorted(set(STUDENT_TERMS) - {"student"}))
def test_each_terms_own_gradient_is_finite_at_every_student_key_and_value(tiny_state, draw_batch, term):
    state = tiny_state(**only(teacher_weight=1.0, **STUDENT_TERMS[term]))
    student_step(state, draw_batch(state))
    moments = state.trainables.optimizers["student"].state
    assert len(moments) == 2 * 7
    assert all(m["exp_avg"].norm() > 0 and torch.isfinite(m["exp_avg"]).all() for m in moments.values())
    assert not state.trainables.optimizers["teacher"].state
    assert not state.trainables.optimizers["critics"].state


@pytest.mark.parametrize("role", ["dino", "dinov2", "clip"])
def test_each_critic_alone_trains_only_its_head(tiny_state, draw_batch, snapshot, changed, role):
    state = tiny_state(**only(**{f"{role}_weight": 1.0}))
    batch = draw_batch(state)
    _, made = student_step(state, batch)
    before = snapshot(state)
    losses = critic_step(state, batch, made)
    assert set(losses) == {f"critic_{role}", "grad_norm_critics"}
    names = {f"critics/{role}.{layer}.{leaf}" for layer in ("hidden", "output") for leaf in ("weight", "bias")}
    assert changed(before, snapshot(state)) == names


def test_critics_compare_photographs_with_the_students_images(tiny_state, draw_batch):
    state = tiny_state(critic_canvas=False)
    batch = draw_batch(state)
    _, made = student_step(state, batch)
    expected = {}
    with torch.no_grad():
        for role, head in state.trainables.critics.items():
            backbone = state.backbones[role]
            real, fake = head(backbone(batch.real, False)), head(backbone(made.pixels, False))
            p_real, p_fake = real.softmax(1)[:, 1], fake.softmax(1)[:, 1]
            expected[f"critic_{role}"] = (-p_real.log().mean() - (1 - p_fake).log().mean()) / 2
    losses = critic_step(state, batch, made)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)


# --- the token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        ({}, set()),
        ({"share_text_encoder": False}, {"rows/student"}),
        ({"teacher_weight": 0.0}, {"rows/teacher", "rows/student"}),  # one and the same tensor
        ({"teacher_weight": 0.0, "share_text_encoder": False}, {"rows/student"}),
        ({"trainable": "kv", "teacher_weight": 0.0}, set()),
    ],
)
def test_student_trains_the_token_only_without_a_training_teacher(
    tiny_state, draw_batch, snapshot, changed, overrides, learns
):
    state = tiny_state(weight_decay=0.0, **overrides)
    batch, before = draw_batch(state), snapshot(state)
    student_step(state, batch)
    assert {n for n in changed(before, snapshot(state)) if n.startswith("rows/")} == learns


def test_student_step_uses_the_token_that_the_teacher_step_updated(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(token_lr=1e-2)
    batch = draw_batch(state)
    before = state.condition(batch.student_prompts, "student").features.detach().clone()
    teacher_step(state, batch)
    with watched(monkeypatch, state.family.student) as calls:
        student_step(state, batch)
    assert len(calls) == 1
    assert not calls[0].text.features.requires_grad
    assert not torch.equal(calls[0].text.features, before)
    assert torch.equal(calls[0].text.features, state.condition(batch.student_prompts, "teacher").features)


def test_vocabulary_is_not_touched(tiny_state, draw_batch, snapshot, changed):
    state = tiny_state(vectors=3)
    before = snapshot(state)
    for step in range(2):
        iterate(state, draw_batch(state, step))
    names = changed(before, snapshot(state))
    assert state.trainables.token_embeddings["teacher"].shape == (3, TINY.text_width)
    assert "rows/teacher" in names
    assert not [n for n in names if n.startswith(("text/", "vae/"))]
