"""The terms that tie the student to the teacher (Eq. 2, 3 and 5), and the teacher's own reconstruction (Eq. 1).

All compute in float32 whatever they are given: squares and cosines of half-precision numbers lose what they measure.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def identity_loss(tokens_student: Tensor, tokens_teacher: Tensor) -> Tensor:
    """Eq. 2: 1 - mean over tokens of the cosine between both images' CLIP tokens, per sample.

    tokens: (B, K, D), 4 tokens of 768 numbers from IP-Adapter's projector. Returns (B,) in [0, 2].
    """
    return 1 - F.cosine_similarity(tokens_student.float(), tokens_teacher.float(), dim=-1).mean(dim=1)


def latent_mse(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    """Eq. 3: mean squared difference of latents (B, C, h, w) over everything but the batch. Returns (B,)."""
    return (z_student.float() - z_teacher.float()).square().mean(dim=(1, 2, 3))


def alignment_weight(alphas_cumprod: Tensor, t: Tensor, by_t: bool) -> Tensor:
    """Eq. 5's c(t), float32 (B,) on t's device, for timesteps t (B,) at which the teacher was asked.

    by_t: abar_t, ADD's exponential weight (Sauer et al. 2023): the noisier the teacher's input, the less its answer
    counts. Otherwise 1 for every timestep. alphas_cumprod: (T,).
    """
    if not by_t:
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)
    return alphas_cumprod.to(t.device)[t].float()


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1 averaged over the valid region: scalar.

    prediction, target: (B, C, h, w). mask: (B, 1, h, w), 1 where the photograph is, 0 on the canvas around it.
    The mean is taken over channels and valid pixels of each image, then over the batch, so that a shrunken photograph
    counts as much as a full one. An image without a valid pixel counts as 0.
    """
    mask = mask.float()
    squares = (prediction.float() - target.float()).square() * mask
    valid = mask.sum(dim=(1, 2, 3)).clamp(min=1) * prediction.shape[1]
    return (squares.sum(dim=(1, 2, 3)) / valid).mean()
