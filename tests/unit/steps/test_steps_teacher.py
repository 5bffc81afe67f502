"""The teacher's step: its loss, its mask, its captions and timesteps."""

from dataclasses import replace

import torch
from step_calls import only, watched

from echodistill_core.training.steps import teacher_step


def test_teachers_loss_has_no_gradient_outside_the_mask(tiny_state, draw_batch, monkeypatch):
    state = tiny_state(batch_size=4)
    batch = draw_batch(state)
    assert 0 < batch.mask.mean().item() < 1
    with watched(monkeypatch, state.family.teacher) as calls:
        teacher_step(state, batch)
    gradient, mask = calls[0].out.grad, batch.mask.expand(-1, 4, -1, -1).bool()
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).all()


def test_teachers_loss_ignores_the_photograph_outside_the_mask(tiny_state, draw_batch, monkeypatch):
    # A UNet's receptive field reaches over the mask, so for this test each latent is predicted from itself alone.
    state = tiny_state(batch_size=2, grad_clip=0.0)
    batch = draw_batch(state)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:5, 1:7], mask[1, :, :, 4:] = 1, 1
    batch = replace(batch, mask=mask)
    factor = state.trainables.weights["teacher"].parameters[
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ]

    def pointwise(self, zt, t, text):
        return zt * factor.sum() + text.features.square().mean()

    monkeypatch.setattr(type(state.family.teacher), "predict", pointwise)
    monkeypatch.setattr(state.trainables.optimizers["teacher"], "step", lambda: None)
    generators = {n: g.get_state() for n, g in state.random.generators.items()}

    def loss_and_gradients(latents):
        for name, generator in state.random.generators.items():
            generator.set_state(generators[name])
        monkeypatch.setattr(state.family, "scaled", lambda posterior, noise: latents)
        gradients = {}
        monkeypatch.setattr(
            state.trainables.optimizers["teacher"],
            "step",
            lambda: gradients.update(
                k=factor.grad.clone(), row=state.trainables.token_embeddings["teacher"].grad.clone()
            ),
        )
        return teacher_step(state, batch)["recon_teacher"], gradients

    loss, gradients = loss_and_gradients(z)
    outside, inside = z + 100 * (1 - mask), z + 0.1 * mask
    loss_outside, gradients_outside = loss_and_gradients(outside)
    assert torch.equal(loss_outside, loss)
    assert torch.equal(gradients_outside["k"], gradients["k"])
    assert torch.equal(gradients_outside["row"], gradients["row"])
    loss_inside, gradients_inside = loss_and_gradients(inside)
    assert not torch.equal(loss_inside, loss)
    assert not torch.equal(gradients_inside["k"], gradients["k"])


def test_teacher_learns_with_the_captions_of_its_views_and_timesteps_of_the_whole_range(
    tiny_state, draw_batch, monkeypatch
):
    state = tiny_state(batch_size=4, **only(teacher_weight=1.0))
    timesteps = []
    for step in range(12):
        batch = draw_batch(state, step)
        with torch.no_grad():
            text = state.condition(batch.prompts, "teacher")
        with watched(monkeypatch, state.family.teacher) as calls:
            teacher_step(state, batch)
        assert torch.equal(calls[0].text.features, text.features)
        timesteps += calls[0].t.tolist()
    assert len(timesteps) == 48
    assert min(timesteps) < 150  # each bound is missed by 48 uniform draws with a chance of 0.0004
    assert max(timesteps) > 850
    assert len(set(timesteps)) > 35
