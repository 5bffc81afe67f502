"""Pictures from the models of a run in memory: previews, the echoing stage's pool, images of the class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sampling import denoise, draw_noise, finished
from .state import TrainState


def one_step_images(state: TrainState, prompts: Sequence[str], seed: int, size: int) -> Tensor:
    """One image for each prompt, (B, 3, size, size) in [-1, 1], from the student as it is; image i from seed + i."""
    return images_of(state, "student", prompts, seed, size, 1)


@torch.no_grad()
def images_of(state: TrainState, role: str, prompts: Sequence[str], seed: int, size: int, steps: int) -> Tensor:
    """One image for each prompt, (B, 3, size, size) in [-1, 1], from a role as it is; image i from seed + i.

    The teacher is guided by the settings' guidance_scale, the student not at all.
    Draws from generators of its own, so looking does not change what training draws.
    Raises DivergedError where an image is not finite.
    """
    denoiser = state.denoiser(role)
    guidance = 1.0 if role == "student" else state.settings.guidance_scale
    noise = draw_noise(state.family, len(prompts), size, size, seed).to(state.device)
    images = []
    for part, _ in state.compute.microbatches(len(prompts)):
        text = state.condition(prompts[part], role)
        unconditional = state.unconditional(len(text)) if guidance != 1.0 else None
        latents = denoise(denoiser, noise[part], text, steps, unconditional=unconditional, guidance=guidance)
        images.append(finished(state.family.decode(latents)))
    return torch.cat(images)
