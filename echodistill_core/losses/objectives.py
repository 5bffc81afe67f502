"""The losses of all three players but Eq. 4 (losses.ms_swd): Eq. 1, 2, 3 and 5 to 7, and a critic's trained head.

All compute in float32 whatever they are given: squares and cosines of half-precision numbers lose precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Registry

FAKE, REAL = 0, 1  # the classes of a critic's logits
HIDDEN = 512


@dataclass(frozen=True)
class LossTerm:
    """A term of the student's loss beyond the paper's, by the name of which setting extra_losses gives its weight.

    compares: "latents" (B, 4, h, w), in every iteration; or "images" (B, 3, H, W) in [-1, 1], in the iterations that
    compute image losses.
    function: from the student's and the teacher's to one value an image, (B,); gradients flow to the first.
    """

    compares: str
    function: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if self.compares not in ("latents", "images"):
            raise ValueError(f"LossTerm compares {self.compares!r}; expected latents or images")


LOSS_TERMS: Registry[LossTerm] = Registry("loss term")


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


class CriticHead(nn.Module):
    """The trained part of a critic: features (B, d) of a frozen backbone to logits (B, 2), [FAKE, REAL].

    features: d, the width of the backbone's features.
    generator: draws the initial weights, as nn.Linear does by default; the module lies on the generator's device.
    """

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = _linear(features, HIDDEN, generator)
        self.output = _linear(HIDDEN, 2, generator)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, 2) of features (B, d)."""
        return self.output(F.relu(self.hidden(features)))


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Eq. 6 for one critic: how little it takes the student's images for photographs, a scalar.

    logits_fake: (B, 2) of the student's images. Cross-entropy with "real" is the non-saturating loss (Goodfellow et al.
    2014): it is steepest where the critic is sure of the fake.
    """
    return _cross_entropy(logits_fake, REAL)


def critic_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Eq. 7 for one critic: cross-entropy of telling photographs from the student's images, a scalar.

    logits: (B, 2) each. Both kinds weigh one half whatever their number; a critic that knows nothing is at ln 2.
    """
    return 0.5 * (_cross_entropy(logits_real, REAL) + _cross_entropy(logits_fake, FAKE))


def _cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Mean cross-entropy of logits (B, 2) with one label for all, in float32."""
    return F.cross_entropy(logits.float(), torch.full(logits.shape[:1], label, device=logits.device))


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """An nn.Linear with its default initial distribution, drawn from `generator` and not from the global one."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=generator.device)
    # nn.Linear draws kaiming_uniform_(a=sqrt(5)), which comes to U(-1/sqrt(inputs), 1/sqrt(inputs)), for both.
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
