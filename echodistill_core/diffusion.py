"""Noise schedules and conversions between noise, velocity and clean latents.

Forward process (DDPM, Ho et al. 2020): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n, with n ~ N(0, I).
A denoiser has one of three prediction types. Given z_t, each prediction determines the other two:

    epsilon        n
    v_prediction   v = sqrt(abar_t) n - sqrt(1 - abar_t) z_0      (Salimans & Ho 2022)
    sample         z_0

Methods of NoiseSchedule take latents (B, C, h, w) and int64 timesteps (B,) in 0..T-1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels that a denoiser was trained with, and its prediction type.

    alphas_cumprod: abar_t for t = 0..T-1, float32 (T,), each in (0, 1].
    prediction_type: one of PREDICTION_TYPES.
    Raises InputError for another prediction type.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    _tables: dict[torch.device, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise InputError(
                f"prediction type {self.prediction_type!r} is unknown; expected one of {', '.join(PREDICTION_TYPES)}."
            )

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps (1000 for Stable Diffusion)."""
        return len(self.alphas_cumprod)

    def table(self, device: torch.device) -> Tensor:
        """abar_t for t = 0..T-1 on a device, (T,). Copied once per device, since each copy makes the host wait."""
        if device not in self._tables:
            self._tables[device] = self.alphas_cumprod.to(device)
        return self._tables[device]

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1), on the device and in the dtype of `like`."""
        abar = self.table(like.device)[t.to(like.device)].to(like.dtype)
        abar = abar.reshape(-1, *[1] * (like.ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n."""
        signal, sigma = self.signal_and_noise(t, z0)
        return signal * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The training target of the denoiser for add_noise(z0, noise, t): n, v or z_0 by its prediction type."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return z0
        signal, sigma = self.signal_and_noise(t, z0)
        return signal * noise - sigma * z0

    def to_x0(self, prediction: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """The estimate of z_0 from a prediction at (z_t, t); for epsilon, (z_t - sqrt(1 - abar_t) e) / sqrt(abar_t)."""
        signal, sigma = self.signal_and_noise(t, zt)
        if self.prediction_type == "epsilon":
            return (zt - sigma * prediction) / signal
        if self.prediction_type == "sample":
            return prediction
        return signal * zt - sigma * prediction

    def to_epsilon(self, prediction: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """The estimate of the noise n from a prediction at (z_t, t)."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, sigma = self.signal_and_noise(t, zt)
        if self.prediction_type == "sample":
            return (zt - signal * prediction) / sigma
        return signal * prediction + sigma * zt


def trailing_timesteps(steps: int, total: int = 1000, strength: float = 1.0) -> list[int]:
    """The last timesteps of `steps` equal intervals of 0..strength*total-1, in descending order.

    diffusers calls this spacing "trailing" (Lin et al. 2024, table 2). For total = 1000, 1 step gives [999], 2 steps
    give [999, 499], and 1 step with strength 0.5 gives [499]. strength: in (0, 1].
    Raises InputError unless steps is 1 to strength*total.
    """
    start = round(total * strength)
    if not 1 <= steps <= start:
        raise InputError(
            f"{steps} steps do not fit into strength {strength}: expected 1 to {start} steps; "
            "raise the strength or lower the steps."
        )
    return [round(start - i * start / steps) - 1 for i in range(steps)]


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): u + scale (c - u). Scale 1 gives the conditional prediction c."""
    return unconditional + scale * (conditional - unconditional)


def timesteps_like(t: int, z: Tensor) -> Tensor:
    """The timestep t, repeated for each image of z (B, ...): int64 (B,) on z's device."""
    return torch.full((z.shape[0],), t, dtype=torch.long, device=z.device)
