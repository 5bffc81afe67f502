"""Algorithm 1 of EchoDistill: the teacher's, the student's and the critics' step of one iteration.

Every step differentiates with respect to the parameters of its own optimiser and no others, so nothing leaks from one
player's loss into another's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion import guided, timesteps_like
from ..losses.adversarial import critic_loss, generator_loss
from ..losses.alignment import alignment_weight, identity_loss, latent_mse, masked_mse
from ..losses.ms_swd import ms_swd
from ..models.family import Denoiser
from .batches import Batch
from .state import TrainState

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """The student's images of this iteration with their graph: latents, and features by backbone role.

    pixels: None where no term looks at them, so that they need not be decoded.
    """

    latents: Tensor
    pixels: Tensor | None
    features: dict[str, Tensor]


def teacher_step(state: TrainState, batch: Batch) -> Losses:
    """Step 1: the teacher, and with it the token, learns the photographs (Eq. 1). Empty where the teacher is frozen."""
    if not state.settings.teaches or not state.learned("teacher"):
        return {}
    assert state.family.teacher is not None
    with state.autocast():
        text = state.text(batch.prompts, "teacher")
        losses = {"teacher": reconstruction(state, state.family.teacher, batch, text)}
        total = state.settings.teacher_weight * _with_prior(state, "teacher", losses)
    losses = {name: loss.detach() for name, loss in losses.items()}
    return {**losses, "teacher_gradient": _step(state, "teacher", total)}


def student_step(state: TrainState, batch: Batch) -> tuple[Losses, Made | None]:
    """Step 2: the student follows the teacher (Eq. 5) and fools the critics (Eq. 6) with an image made in one step.

    Returns the losses and what was made, which the critics' step looks at again; None where no term needs an image.
    """
    s, losses, made = state.settings, Losses(), None
    total = torch.zeros((), device=state.device)
    with state.autocast():
        if s.student_reconstruction_weight > 0:
            text = _student_text(state, batch.prompts)
            losses["student"] = reconstruction(state, state.family.student, batch, text)
            total = total + s.student_reconstruction_weight * _with_prior(state, "student", losses)
        if s.generates:
            noise = _noise(state, batch)
            made = generate(state, noise, _student_text(state, batch.student_prompts))
            if s.aligns:
                terms, weight = alignment(state, made, noise, batch.student_prompts)
                losses.update({name: loss.mean() for name, loss in terms.items()})
                weights = {"identity": s.identity_weight, "mse": s.mse_weight, "swd": s.swd_weight}
                aligned = sum(weights[name] * loss for name, loss in terms.items())
                losses["alignment"] = (weight * aligned).mean()
                total = total + s.alignment_weight * losses["alignment"]
            for role, share in critics_of(state).items():
                losses[f"fool_{role}"] = generator_loss(state.critics[role](made.features[role]))
                total = total + s.adversarial_weight * share * losses[f"fool_{role}"]
    losses = {name: loss.detach() for name, loss in losses.items()}
    if losses and state.learned("student"):
        losses["student_gradient"] = _step(state, "student", total)
    return losses, made


def critic_step(state: TrainState, batch: Batch, made: Made | None) -> Losses:
    """Step 3: each critic's head learns to tell photographs from the student's images (Eq. 7), where it is its turn."""
    critics = critics_of(state)
    if made is None or not critics:
        return {}
    losses = Losses()
    total = torch.zeros((), device=state.device)
    with state.autocast():
        for role in critics:
            with torch.no_grad():
                real = look(state, role, batch.real)
            head = state.critics[role]
            losses[f"critic_{role}"] = critic_loss(head(real), head(made.features[role].detach()))
            total = total + losses[f"critic_{role}"]
    losses = {name: loss.detach() for name, loss in losses.items()}
    losses["critic_gradient"] = _step(state, "critics", total)
    return losses


def critics_of(state: TrainState) -> dict[str, float]:
    """The critics whose turn it is in this iteration, with their shares in Eq. 6."""
    return state.settings.critic_weights if state.step % state.settings.critic_every == 0 else {}


def reconstruction(
    state: TrainState, denoiser: Denoiser, batch: Batch, text: Tensor, *, data: str = "data", drawn: str = "noise"
) -> Tensor:
    """Eq. 1: |target - UNet(z_t, t, tau(y))|^2 over the valid region, t ~ U{0..T-1}; a scalar.

    data, drawn: the generators of the posterior, and of noise and timestep.
    """
    with torch.no_grad():
        z = state.family.encode(batch.pixels, state.generators[data])
    noise, t = _noise(state, batch, drawn), _timesteps(state, denoiser, z, drawn)
    prediction = denoiser.predict(denoiser.schedule.add_noise(z, noise, t), t, text)
    return masked_mse(prediction, denoiser.schedule.target(z, noise, t), batch.mask)


def _with_prior(state: TrainState, role: str, losses: Losses) -> Tensor:
    """Eq. 1 of this role plus prior_weight times Eq. 1 on images of the class (Ruiz et al. 2023), added to `losses`."""
    if role not in state.settings.prior_roles:
        return losses[role]
    denoiser = state.family.student if role == "student" else state.family.teacher
    assert denoiser is not None
    batch = state.prior[role].draw(state.step, state.generators["prior"]).to(state.device)
    # The captions lack the placeholder, so this keeps the weights and leaves the token to the photographs.
    text = state.text(batch.prompts, role).detach()
    losses[f"{role}_prior"] = reconstruction(state, denoiser, batch, text, data="prior", drawn="prior")
    return losses[role] + state.settings.prior_weight * losses[f"{role}_prior"]


def generate(state: TrainState, noise: Tensor, text: Tensor) -> Made:
    """The one-step map z_st = (n - sqrt(1 - abar) eps(n, T-1, y)) / sqrt(abar), its image and that image's features."""
    student = state.family.student
    t = timesteps_like(student.schedule.timesteps - 1, noise)
    latents = student.schedule.to_x0(student.predict(noise, t, text), noise, t)
    s, roles = state.settings, set(critics_of(state))
    if s.aligns and s.identity_weight > 0:
        roles.add("clip")
    if not roles and not (s.aligns and s.swd_weight > 0):
        return Made(latents, None, {})
    pixels = state.family.decode(latents)
    return Made(latents, pixels, {role: look(state, role, pixels) for role in sorted(roles)})


def alignment(state: TrainState, made: Made, noise: Tensor, prompts: Sequence[str]) -> tuple[Losses, Tensor]:
    """Eq. 2 to 4, each (B,), and c(t) of the timesteps that were drawn, (B,).

    The teacher sees the student's latents re-noised with the very noise they were made from, once, with guidance.
    """
    s, teacher = state.settings, state.family.teacher
    assert teacher is not None
    with torch.no_grad():
        t = _timesteps(state, teacher, noise)
        zt = teacher.schedule.add_noise(made.latents.detach(), noise, t)
        text = torch.cat([state.unconditional(len(zt)), state.text(prompts, "teacher")])
        without, with_text = teacher.predict(zt.repeat(2, 1, 1, 1), t.repeat(2), text).chunk(2)
        clean = teacher.schedule.to_x0(guided(with_text, without, s.guidance_scale), zt, t)
        # The image is needed only by the terms that compare images.
        pixels = state.family.decode(clean) if s.identity_weight > 0 or s.swd_weight > 0 else None
    terms = Losses()
    if s.identity_weight > 0:
        assert pixels is not None
        with torch.no_grad():
            target = look(state, "clip", pixels)
        tokens = state.backbones["clip"].tokens
        terms["identity"] = identity_loss(tokens(made.features["clip"]), tokens(target))
    if s.mse_weight > 0:
        terms["mse"] = latent_mse(made.latents, clean)
    if s.swd_weight > 0:
        assert pixels is not None
        assert made.pixels is not None
        a, b = ((made.pixels + 1) / 2, (pixels + 1) / 2) if s.swd_unit_range else (made.pixels, pixels)
        terms["swd"] = ms_swd(a, b, state.generators["noise"], levels=s.swd_levels, projections=s.swd_projections)
    return terms, alignment_weight(teacher.schedule.alphas_cumprod.to(t.device), t, s.alignment_by_t)


def look(state: TrainState, role: str, pixels: Tensor) -> Tensor:
    """A backbone's features (B, d) of images (B, 3, H, W) in [-1, 1], normalised as the settings say."""
    return state.backbones[role](pixels, normalise=state.settings.backbone_normalisation)


def _student_text(state: TrainState, prompts: Sequence[str]) -> Tensor:
    text = state.text(prompts, "student")
    # Where the token learns from the teacher, the student reads it and may not change it.
    return text.detach() if state.token_learns_from == "teacher" else text


def _noise(state: TrainState, batch: Batch, drawn: str = "noise") -> Tensor:
    factor = state.family.latent_factor
    count, _, height, width = batch.pixels.shape
    shape = (count, state.family.student.unet.config["in_channels"], height // factor, width // factor)
    return torch.randn(shape, generator=state.generators[drawn]).to(state.device)


def _timesteps(state: TrainState, denoiser: Denoiser, z: Tensor, drawn: str = "noise") -> Tensor:
    t = torch.randint(denoiser.schedule.timesteps, (len(z),), generator=state.generators[drawn])
    return t.to(z.device)


def _step(state: TrainState, name: str, loss: Tensor) -> Tensor:
    """Differentiate, clip and step one optimiser. Returns the gradient's norm before clipping."""
    optimizer, parameters = state.optimizers[name], state.learned(name)
    limit = state.settings.critic_grad_clip if name == "critics" else state.settings.grad_clip
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()
