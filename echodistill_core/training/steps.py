"""Algorithm 1 of EchoDistill: the teacher's, the student's and the critics' step of one iteration.

Every step differentiates with respect to the parameters of its own optimiser and no others, so nothing leaks from one
player's loss into another's gradients. Gradients are summed over the parts of a batch, which is one part unless
memory_mode is low; all that is random is drawn for the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses.adversarial import critic_loss
from ..losses.alignment import masked_mse
from .batches import Batch
from .one_step import Losses, Made, critics_of, look, make_and_compare, sees_images
from .state import TrainState


def iterate(state: TrainState, batch: Batch) -> Losses:
    """One iteration of Algorithm 1: every player's step, and all losses."""
    losses = teacher_step(state, batch)
    student_losses, made = student_step(state, batch)
    return losses | student_losses | critic_step(state, batch, made)


def teacher_step(state: TrainState, batch: Batch) -> Losses:
    """Step 1: the teacher, and with it the token, learns the photographs (Eq. 1). Empty where the teacher is frozen."""
    if not state.settings.teaches or not state.learned("teacher"):
        return {}
    losses = _learn_images(state, "teacher", batch, state.settings.teacher_weight)
    return {**losses, "teacher_gradient": _step(state, "teacher")}


def student_step(state: TrainState, batch: Batch) -> tuple[Losses, Made | None]:
    """Step 2: the student follows the teacher (Eq. 5) and fools the critics (Eq. 6) with an image made in one step.

    Returns the losses and what was made, which the critics' step looks at again; None where no term needs it.
    """
    s, losses, made = state.settings, Losses(), None
    if s.student_reconstruction_weight > 0:
        losses |= _learn_images(state, "student", batch, s.student_reconstruction_weight)
    if critics_of(state) or (s.aligns and (s.mse_weight > 0 or sees_images(state))):
        compared, made = make_and_compare(state, batch)
        losses |= compared
    if losses and state.learned("student"):
        losses["student_gradient"] = _step(state, "student")
    return losses, made


def critic_step(state: TrainState, batch: Batch, made: Made | None) -> Losses:
    """Step 3: each critic's head learns to tell photographs from the student's images (Eq. 7), where it is its turn."""
    critics = critics_of(state)
    if made is None or not critics:
        return {}
    losses = Losses()
    for role in critics:
        real = torch.cat([_features(state, role, batch, part) for part, _ in state.parts(len(batch))])
        head = state.critics[role]
        loss = critic_loss(head(real), head(made.features[role]))
        loss.backward(inputs=list(head.parameters()))
        losses[f"critic_{role}"] = loss.detach()
    losses["critic_gradient"] = _step(state, "critics")
    return losses


def _learn_images(state: TrainState, role: str, batch: Batch, weight: float) -> Losses:
    """Differentiate weight * (Eq. 1 + prior_weight * Eq. 1 on images of the class, Ruiz et al. 2023) of this role."""
    s = state.settings
    losses = {role: _reconstruct(state, role, batch, weight)}
    if role in s.prior_roles:
        images = state.prior[role].draw(state.step, state.generators["prior"]).to(state.device)
        losses[f"{role}_prior"] = _reconstruct(state, role, images, weight * s.prior_weight, prior=True)
    return losses


def _reconstruct(state: TrainState, role: str, batch: Batch, weight: float, *, prior: bool = False) -> Tensor:
    """Differentiate weight * Eq. 1: |target - UNet(z_t, t, tau(y))|^2 over the valid region, t ~ U{0..T-1}; a scalar.

    prior: of images of the class. Their captions lack the placeholder, so they keep the weights where they are and
    leave the token to the photographs; their random numbers come from a generator of their own.
    """
    denoiser, leaves = state.denoiser(role), state.leaves(role)
    generator = "prior" if prior else "noise"
    noise = state.draw_noise(batch, generator)
    t = state.draw_timesteps(denoiser, len(batch), generator)
    total = torch.zeros((), device=state.device)
    for part, share in state.parts(len(batch)):
        z = state.family.scaled(_posterior(state, batch, part), batch.posterior_noise[role][part])
        zt = denoiser.schedule.add_noise(z, noise[part], t[part])
        target = denoiser.schedule.target(z, noise[part], t[part])
        text = state.read(batch.prompts[part], role, learning=not prior)
        prediction = denoiser.predict(zt, t[part], text)
        loss = masked_mse(prediction, target, batch.mask[part])
        if leaves:
            (weight * share * loss).backward(inputs=leaves)
        total += share * loss.detach()
    return total


@torch.no_grad()
def _posterior(state: TrainState, batch: Batch, part: slice) -> Tensor:
    """Mean and deviation of the latents of what the teacher learns from; of views that come again, made once."""
    return state.kept_by_view("vae", batch.views[part], batch.pixels[part], state.family.posterior)


@torch.no_grad()
def _features(state: TrainState, role: str, batch: Batch, part: slice) -> Tensor:
    """Features (B, d) of what a critic takes for real; of views that come again, made once."""
    return state.kept_by_view(role, batch.real_views[part], batch.real[part], lambda x: look(state, role, x))


def _step(state: TrainState, name: str) -> Tensor:
    """Clip the gradients that are there and step one optimiser. Returns the gradient's norm before clipping."""
    optimizer, parameters = state.optimizers[name], state.learned(name)
    if name in state.weights:
        state.weights[name].grads_to_master()
    limit = state.settings.critic_grad_clip if name == "critics" else state.settings.grad_clip
    norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if name in state.weights:
        state.weights[name].publish()
    return norm.detach()
