"""The alignment of student and teacher, computed by hand with the schedule of diffusers."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from step_calls import only, watched

from echodistill_core.models.architectures import TINY
from echodistill_core.training import steps
from echodistill_core.training.state import TrainState
from echodistill_core.training.steps import student_step, teacher_step


@pytest.mark.parametrize("by_t", [True, False])
def test_alignment_calls_the_teacher_as_in_the_method(tiny_state, draw_batch, monkeypatch, by_t):
    state = tiny_state(batch_size=3, alignment_by_t=by_t, **only(teacher_weight=1.0, mse_weight=1.0))
    batch = draw_batch(state)
    family = state.family
    with watched(monkeypatch, family.teacher) as teacher, watched(monkeypatch, family.student) as student:
        losses, made = student_step(state, batch)
    assert len(teacher) == len(student) == 1
    asked, one_step = teacher[0], student[0]
    # The student: one step from the noise at t = 999, with abar_999 = 0.0046601.
    ddpm = DDPMScheduler(**TINY.scheduler)
    abar = ddpm.alphas_cumprod
    noise = one_step.zt
    assert one_step.t.tolist() == [999] * 3
    expected = (noise - (1 - abar[999]).sqrt() * one_step.out) / abar[999].sqrt()
    torch.testing.assert_close(made.latents, expected, rtol=1e-5, atol=1e-5)
    # The teacher: those latents re-noised with the same noise, once without words and once with, in one batch.
    t = asked.t[:3]
    zt = ddpm.add_noise(made.latents.detach(), noise, t)
    torch.testing.assert_close(asked.zt, torch.cat([zt, zt]), rtol=1e-5, atol=1e-5)
    assert torch.equal(asked.t[3:], t)
    assert len(set(t.tolist())) == 3
    with torch.no_grad():
        text = torch.cat(
            [family.text([""]).expand(3, -1, -1), state.condition(batch.student_prompts, "teacher").features]
        )
    assert torch.equal(asked.text.features, text)
    # Detached altogether.
    assert not asked.graded
    assert not any(x.requires_grad for x in (asked.zt, asked.text.features, asked.out))
    # Guidance 7.5, clean latents from the velocity, and c(t) = abar_t for each sample on its own.
    without, conditional = asked.out.chunk(2)
    v, signal = without + 7.5 * (conditional - without), abar[t].reshape(3, 1, 1, 1)
    clean = signal.sqrt() * zt - (1 - signal).sqrt() * v
    each = (made.latents - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(losses["mse"], each.mean().detach(), rtol=1e-4, atol=0)
    weighted = ((abar[t] if by_t else torch.ones(3)) * each).mean().detach()
    torch.testing.assert_close(losses["alignment"], weighted, rtol=1e-4, atol=0)


def test_alignment_is_the_weighted_sum_of_its_terms_for_each_sample(tiny_state, draw_batch, monkeypatch):
    weights = {"identity_weight": 0.7, "mse_weight": 0.2, "swd_weight": 0.3}
    state = tiny_state(batch_size=3, **{**only(teacher_weight=1.0), **weights})
    batch, terms = draw_batch(state), {}
    for name in ("identity_loss", "latent_mse", "ms_swd_along"):
        original = getattr(steps, name)

        def keep(*args, original=original, name=name, **kwargs):
            terms[name] = original(*args, **kwargs)
            return terms[name]

        monkeypatch.setattr(steps, name, keep)
    with watched(monkeypatch, state.family.teacher) as calls:
        losses, _ = student_step(state, batch)
    c = DDPMScheduler(**TINY.scheduler).alphas_cumprod[calls[0].t[:3]]
    expected = sum(c[i] * (0.7 * terms["identity_loss"][i] + 0.2 * terms["latent_mse"][i]) for i in range(3))
    expected = (expected + (c * 0.3 * terms["ms_swd_along"]).sum()) / 3
    torch.testing.assert_close(losses["alignment"], expected.detach(), rtol=1e-5, atol=1e-7)


def test_guidance_scale_one_follows_the_condition_alone(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(guidance_scale=1.0, **only(teacher_weight=1.0, mse_weight=1.0))
    with watched(monkeypatch, state.family.teacher) as calls:
        losses, made = student_step(state, draw_batch(state))
    signal = DDPMScheduler(**TINY.scheduler).alphas_cumprod[calls[0].t[0]]
    clean = signal.sqrt() * calls[0].zt[1:] - (1 - signal).sqrt() * calls[0].out[1:]
    torch.testing.assert_close(losses["mse"], (made.latents - clean).square().mean().detach(), rtol=1e-4, atol=0)


def test_a_teacher_that_predicts_noise_works_as_well(tiny_family, tiny_state, draw_batch, monkeypatch):
    family = tiny_family()
    schedule = replace(family.teacher.schedule, prediction_type="epsilon")
    family.teacher = replace(family.teacher, schedule=schedule)
    state = tiny_state(family, batch_size=2, augment=False, **only(teacher_weight=1.0, mse_weight=1.0))
    batch, noises = draw_batch(state), []
    original = TrainState.draw_noise
    monkeypatch.setattr(TrainState, "draw_noise", lambda *args: noises.append(original(*args)) or noises[-1])
    with watched(monkeypatch, family.teacher) as calls:
        losses = teacher_step(state, batch)
        student_losses, made = student_step(state, batch)
    learning, asked = calls
    torch.testing.assert_close(losses["recon_teacher"], (learning.out - noises[0]).square().mean().detach())
    abar = DDPMScheduler(**TINY.scheduler).alphas_cumprod[asked.t[:2]].reshape(2, 1, 1, 1)
    without, conditional = asked.out.chunk(2)
    eps = without + 7.5 * (conditional - without)
    clean = (asked.zt[:2] - (1 - abar).sqrt() * eps) / abar.sqrt()
    expected = (made.latents - clean).square().mean().detach()
    torch.testing.assert_close(student_losses["mse"], expected, rtol=1e-4, atol=0)
