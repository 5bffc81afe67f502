"""Samples from the models of a run in memory: previews, the pool of the echoing stage, class images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sampling import clamp_finite, denoise, draw_noise
from .state import TrainState


def one_step_images(state: TrainState, prompts: Sequence[str], seed: int, size: int) -> Tensor:
    """`sample_images` of the current student in one step."""
    return sample_images(state, "student", prompts, seed, size, 1)


@torch.no_grad()
def sample_images(state: TrainState, role: str, prompts: Sequence[str], seed: int, size: int, steps: int) -> Tensor:
    """One image per prompt, (B, 3, size, size) in [-1, 1], from the current model of a role. Image i has seed + i.

    steps: DDIM steps, 1 or more. The teacher uses classifier-free guidance with guidance_scale, the student none.
    Samples use separate RNG seeds and do not perturb training.
    Raises DivergedError if an image holds NaN or infinity.
    """
    denoiser = state.denoiser(role)
    guidance = 1.0 if role == "student" else state.settings.guidance_scale
    noise = draw_noise(state.family, len(prompts), size, size, seed).to(state.device)
    images = []
    for part, _ in state.compute.microbatches(len(prompts)):
        text = state.condition(prompts[part], role)
        unconditional = state.unconditional(len(text)) if guidance != 1.0 else None
        latents = denoise(denoiser, noise[part], text, steps, unconditional=unconditional, guidance=guidance)
        images.append(clamp_finite(state.family.decode(latents)))
    return torch.cat(images)
