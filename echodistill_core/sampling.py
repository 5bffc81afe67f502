"""Sampling in one or more steps, from noise or from a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter.apply import Personalised
from .diffusion import guided, timesteps_like, trailing_timesteps
from .errors import DivergedError, InputError
from .models.conditioning import TextConditioning
from .models.family import Denoiser, Family

TEACHER_STEPS = 25  # steps of the teacher in the paper


def draw_noise(family: Family, count: int, height: int, width: int, seed: int | Sequence[int]) -> Tensor:
    """Unit noise (count, 4, height/8, width/8), float32 on the CPU.

    height, width: in pixels. seed: image i has seed + i, or seed[i]; its noise does not depend on the other images.
    Raises InputError if a side is no multiple of the VAE's factor (8), or if the number of seeds differs from count.
    """
    seeds = range(seed, seed + count) if isinstance(seed, int) else seed
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds were given for {count} images; expected one for each.")
    factor = family.latent_factor
    if height < factor or width < factor or height % factor or width % factor:
        raise InputError(
            f"size {width}x{height} cannot be made; expected multiples of {factor} pixels, for instance 512x512."
        )
    shape = (family.latent_channels, height // factor, width // factor)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    noise: Tensor,
    text: TextConditioning,
    steps: int,
    *,
    unconditional: TextConditioning | None = None,
    guidance: float = 1.0,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eta = 0) over trailing timesteps (diffusion.trailing_timesteps).

    With one step and without `start`, this is the one-step map of training (training.steps.one_step).
    noise: (B, 4, h, w). text, unconditional: of B prompts; `unconditional` is used if guidance is not 1.
    start: clean latents (B, 4, h, w), noised to the first timestep; None starts from `noise` itself.
    strength: in (0, 1], the share of the process that runs on `start`; ignored without it.
    Returns clean latents (B, 4, h, w), float32. Raises InputError as `trailing_timesteps` does.
    """
    schedule = denoiser.schedule
    timesteps = trailing_timesteps(steps, schedule.timesteps, strength if start is not None else 1.0)
    z = noise
    if start is not None:
        z = schedule.add_noise(start, noise, timesteps_like(timesteps[0], noise))
    clean = z
    for i, step in enumerate(timesteps):
        t = timesteps_like(step, z)
        prediction = denoiser.predict(z, t, text)
        if guidance != 1.0 and unconditional is not None:
            prediction = guided(prediction, denoiser.predict(z, t, unconditional), guidance)
        clean = schedule.to_x0(prediction, z, t)
        if i + 1 < len(timesteps):
            z = schedule.add_noise(clean, schedule.to_epsilon(prediction, z, t), timesteps_like(timesteps[i + 1], z))
    return clean


def clamp_finite(images: Tensor) -> Tensor:
    """Decoded images (B, 3, H, W), clamped to [-1, 1]. Raises DivergedError if a value is NaN or infinite."""
    # Checked before clamping, which would turn infinity into 1.
    bad = int((~torch.isfinite(images)).sum())
    if bad:
        raise DivergedError(
            f"the pictures hold NaN or infinity ({bad} of {images.numel()} values); expected finite numbers. Compute "
            "with precision fp32, or lower the adapters' strength or the learning rates; if it stays, the checkpoint "
            "or an adapter is damaged: choose another."
        )
    return images.clamp(-1, 1)


@torch.no_grad()
def sample(
    model: Personalised,
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    steps: int = 1,
    height: int = 0,
    width: int = 0,
    guidance: float = 1.0,
    image: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Images (B, 3, height, width) in [-1, 1], float32, one per prompt.

    seed: image i has seed + i, or seed[i]. steps: 1 or more.
    height, width: in pixels, multiples of 8; 0 for the family's resolution.
    guidance: scale of classifier-free guidance; 1 for none, as the one-step student needs it.
    image: (1 or B, 3, height, width) in [-1, 1], for image-to-image; strength in (0, 1] is the share of the process
    that runs on it.
    Raises InputError for sizes, steps, strengths, seeds or prompts that do not fit, and DivergedError if an image is
    not finite.
    """
    family = model.family
    height, width = height or family.architecture.resolution, width or family.architecture.resolution
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; expected more than 0 (keep the picture) and at most 1 (redraw it).")
    noise = draw_noise(family, len(prompts), height, width, seed).to(family.device)
    model.encoder.warn_truncated(prompts)
    text = model.condition(prompts)
    unconditional = model.condition([""]).expand(len(text)) if guidance != 1.0 else None
    start = None
    if image is not None:
        if image.shape[-2:] != (height, width):
            raise InputError(
                f"the picture is {image.shape[-1]}x{image.shape[-2]}; expected {width}x{height}, as asked for."
            )
        start = family.encode(image.to(family.device)).expand_as(noise)
    latents = denoise(
        model.denoiser,
        noise,
        text,
        steps,
        unconditional=unconditional,
        guidance=guidance,
        start=start,
        strength=strength,
    )
    return clamp_finite(family.decode(latents))
