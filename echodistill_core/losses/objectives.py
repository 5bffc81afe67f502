"""The loss terms of Eq. 1 to 3 and 5 to 7, and the critics' trained heads. Eq. 4 is in losses.ms_swd.

All functions compute in float32, whatever the precision of their inputs.
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
    """An alignment term beyond the paper's. Register it in LOSS_TERMS; setting extra_losses gives its weight by name.

    compares: "latents" for inputs (B, 4, h, w), computed in every iteration, or "images" for inputs (B, 3, H, W) in
    [-1, 1], computed in iterations with image losses. Raises ValueError for another value.
    function: (student, teacher) -> one value per image, (B,). Gradients flow to the first argument.
    """

    compares: str
    function: Callable[[Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if self.compares not in ("latents", "images"):
            raise ValueError(f"LossTerm compares {self.compares!r}; expected latents or images")


# A term's name is its column in the log, and stands before "=" in extra_losses. Columns of other losses contain "_".
LOSS_TERMS: Registry[LossTerm] = Registry(
    "loss term",
    pattern="[A-Za-z0-9-]+",
    reserved=("step", "identity", "mse", "swd", "alignment", "teacher", "student"),
)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1 averaged over the valid region, a scalar:

        L = mean_b [ sum_{c,i} m_bi (p_bci - q_bci)^2 / (C max(1, sum_i m_bi)) ]

    prediction p, target q: (B, C, h, w). mask m: (B, 1, h, w), 1 inside the photograph, 0 on the canvas around it.
    Averaging per image first gives a shrunken photograph the same weight as a full one.
    """
    mask = mask.float()
    squares = (prediction.float() - target.float()).square() * mask
    valid = mask.sum(dim=(1, 2, 3)).clamp(min=1) * prediction.shape[1]
    return (squares.sum(dim=(1, 2, 3)) / valid).mean()


def identity_loss(tokens_student: Tensor, tokens_teacher: Tensor) -> Tensor:
    """Eq. 2: 1 - mean_k cos(f_s,k, f_t,k), (B,) in [0, 2].

    tokens_student, tokens_teacher: CLIP features (B, K, D) of the images; IP-Adapter's projector gives K = 4 tokens of
    D = 768.
    """
    return 1 - F.cosine_similarity(tokens_student.float(), tokens_teacher.float(), dim=-1).mean(dim=1)


def latent_mse(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    """Eq. 3: mean squared difference of latents (B, C, h, w) per image, (B,)."""
    return (z_student.float() - z_teacher.float()).square().mean(dim=(1, 2, 3))


def alignment_weight(alphas_cumprod: Tensor, t: Tensor, by_t: bool) -> Tensor:
    """c(t) of Eq. 5, float32 (B,) in [0, 1] on t's device.

    alphas_cumprod: abar_t, (T,). t: timesteps (B,) in 0..T-1 of the teacher's inputs.
    by_t: c(t) = abar_t, the exponential weighting of ADD (Sauer et al. 2023), which decreases with the noise level;
    False for c(t) = 1.
    """
    if not by_t:
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)
    return alphas_cumprod.to(t.device)[t].float()


class CriticHead(nn.Module):
    """The trained part of a critic, an MLP with one hidden layer: features (B, d) of a frozen backbone to logits
    (B, 2) of the classes FAKE and REAL.

    features: d, the width of the backbone's features.
    generator: draws the initial weights with nn.Linear's default distribution, on the generator's device.
    """

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = _linear(features, HIDDEN, generator)
        self.output = _linear(HIDDEN, 2, generator)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, 2) of features (B, d)."""
        return self.output(F.relu(self.hidden(features)))


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Eq. 6 for one critic: mean of -log p(REAL | x_s), the non-saturating loss of Goodfellow et al. 2014; a scalar.

    logits_fake: (B, 2) of the student's images.
    """
    return _cross_entropy(logits_fake, REAL)


def critic_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Eq. 7 for one critic: (mean of -log p(REAL | x_real) + mean of -log p(FAKE | x_s)) / 2, a scalar.

    logits_real: (B, 2) of photographs. logits_fake: (B', 2) of the student's images. Equal logits give ln 2.
    """
    return 0.5 * (_cross_entropy(logits_real, REAL) + _cross_entropy(logits_fake, FAKE))


def _cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Mean cross-entropy of logits (B, 2) with the same label for every row, in float32."""
    return F.cross_entropy(logits.float(), torch.full(logits.shape[:1], label, device=logits.device))


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """An nn.Linear with its default initial distribution, drawn from `generator` instead of the global generator."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=generator.device)
    # nn.Linear's kaiming_uniform_(a=sqrt(5)) is U(-1/sqrt(inputs), 1/sqrt(inputs)) for weight and bias.
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
