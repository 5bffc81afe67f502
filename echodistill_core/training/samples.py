"""Pictures from the student while it trains: previews, and the echoing stage's pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sampling import denoise, draw_noise
from .state import TrainState


@torch.no_grad()
def one_step_images(state: TrainState, prompts: Sequence[str], seed: int, size: int) -> Tensor:
    """One image for each prompt, (B, 3, size, size) in [-1, 1], from the student as it is; image i from seed + i.

    Draws from generators of its own, so looking does not change what training draws.
    """
    noise = draw_noise(state.family, len(prompts), size, size, seed).to(state.device)
    with state.autocast():
        latents = denoise(state.family.student, noise, state.text(prompts, "student"), steps=1)
        return state.family.decode(latents).clamp(-1, 1)
