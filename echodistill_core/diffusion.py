"""The algebra between noise, velocity and clean latents, which teacher and student share.

Forward process (Ho et al. 2020, DDPM): z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n, with n ~ N(0, I).
A denoiser predicts one of three things about z_t, and each determines the others given z_t:

    epsilon        n
    v_prediction   v = sqrt(abar_t) n - sqrt(1 - abar_t) z_0      (Salimans & Ho 2022)
    sample         z_0

All functions take latents (B, C, h, w) and integer timesteps (B,) in 0..T-1, and broadcast abar_t over an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels a denoiser was trained under, and what it predicts.

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
        """abar_t for t = 0..T-1 on a device, (T,). It is sent there once: each time, the host would wait for it."""
        if device not in self._tables:
            self._tables[device] = self.alphas_cumprod.to(device)
        return self._tables[device]

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), shaped (B, 1, 1, 1), on the device and dtype of `like`."""
        abar = self.table(like.device)[t.to(like.device)].to(like.dtype)
        abar = abar.reshape(-1, *[1] * (like.ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) n."""
        signal, sigma = self.signal_and_noise(t, z0)
        return signal * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect denoiser of this prediction type returns for add_noise(z0, noise, t)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return z0
        signal, sigma = self.signal_and_noise(t, z0)
        return signal * noise - sigma * z0

    def to_x0(self, prediction: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """The clean latents that `prediction` at (z_t, t) stands for. With epsilon at T-1 this is the one-step map."""
        signal, sigma = self.signal_and_noise(t, zt)
        if self.prediction_type == "epsilon":
            return (zt - sigma * prediction) / signal
        if self.prediction_type == "sample":
            return prediction
        return signal * zt - sigma * prediction

    def to_epsilon(self, prediction: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """The noise that `prediction` at (z_t, t) stands for."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, sigma = self.signal_and_noise(t, zt)
        if self.prediction_type == "sample":
            return (zt - signal * prediction) / sigma
        return signal * prediction + sigma * zt


def trailing_timesteps(steps: int, total: int = 1000, strength: float = 1.0) -> list[int]:
    """Timesteps that end each of `steps` equal intervals of the first strength*total timesteps, noisiest first.

    diffusers calls this spacing "trailing" (Lin et al. 2024, table 2): 1 step gives [999], 2 give [999, 499].
    strength in (0, 1] is the share of the process that is run; 0.5 in one step gives [499].
    Raises InputError where there are fewer timesteps than steps.
    """
    start = round(total * strength)
    if not 1 <= steps <= start:
        raise InputError(
            f"{steps} steps do not fit into strength {strength}: expected 1 to {start} steps; "
            "raise the strength or lower the steps."
        )
    return [round(start - i * start / steps) - 1 for i in range(steps)]


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): u + s (c - u). Scale 1 is the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)


def timesteps_like(t: int, z: Tensor) -> Tensor:
    """The timestep t for every image of z: int64 (B,) on z's device."""
    return torch.full((z.shape[0],), t, dtype=torch.long, device=z.device)
