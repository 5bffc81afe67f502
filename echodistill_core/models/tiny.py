"""The tiny family: SD 2.x's structure with a few hundred thousand random weights, for tests and trial commands.

It is untrained; its images are noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .architectures import TINY
from .assemble import empty_text_encoder, empty_unet, empty_vae

TEACHER_SEED, STUDENT_SEED, SHARED_SEED = 1, 2, 3

StateDict = dict[str, Tensor]


def random_weights(shapes: dict[str, Tensor], seed: int) -> StateDict:
    """Fill the given (meta) tensors: matrices N(0, 1/fan_in), norm scales 1, biases 0; float32.

    All tensors are drawn in order from one generator: equal shapes and seeds give equal weights.
    """
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, like in shapes.items():
        if like.ndim >= 2:
            fan_in = like[0].numel() if "embedding" not in name else like.shape[-1]
            result[name] = torch.randn(like.shape, generator=generator) * fan_in**-0.5
        elif name.endswith("bias"):
            result[name] = torch.zeros(like.shape)
        else:
            result[name] = torch.ones(like.shape)
    return result


def tiny_checkpoint(role: str) -> dict[str, Any]:
    """A tiny checkpoint's state dictionaries in diffusers' layout: `unet`, `text_encoder`, `vae`.

    role: "teacher" or "student"; both share text encoder and VAE, as SD 2.1 and SD-Turbo do.
    """
    seed = TEACHER_SEED if role == "teacher" else STUDENT_SEED
    return {
        "unet": random_weights(empty_unet(TINY).state_dict(), seed),
        "text_encoder": random_weights(empty_text_encoder(TINY).state_dict(), SHARED_SEED),
        "vae": random_weights(empty_vae(TINY).state_dict(), SHARED_SEED),
    }
