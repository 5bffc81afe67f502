"""The adversarial game between the student and one critic (Eq. 6 and 7): a head on frozen features and both losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAKE, REAL = 0, 1  # the classes of a critic's logits
HIDDEN = 512


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
