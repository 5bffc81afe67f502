"""Checks that a VAE and a UNet use the same latents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..messages import shortened


def check_vae(config: Mapping[str, Any], tensors: Mapping[str, Tensor], channels: int, origin: str) -> None:
    """Raise InputError unless the VAE has `channels` latent channels and scales them only.

    config: the VAE's diffusers configuration. scaling_factor defaults to Stable Diffusion's 0.18215, as in diffusers.
    force_upcast is ignored: the caller chooses the precision. A shift, mean or deviation of the latents is refused.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise InputError(
            f"{origin} is of the class {shortened(repr(kind))}; expected AutoencoderKL, Stable Diffusion's VAE; choose "
            "another checkpoint."
        )
    conv_in = tensors.get("decoder.conv_in.weight")
    stated = config.get("latent_channels", 4)
    found = conv_in.shape[1] if conv_in is not None and conv_in.ndim == 4 else stated
    for number in (found, stated):
        if number != channels:
            raise InputError(
                f"{origin} has {shortened(number)} latent channels, but the UNet reads {channels}; expected the VAE of "
                "the UNet's own family; choose a checkpoint with that one."
            )
    scale = config.get("scaling_factor", 0.18215)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise InputError(
            f"{origin}: scaling_factor is {shortened(repr(scale))}; expected a positive number, 0.18215 for Stable "
            "Diffusion 1.x and 2.x; correct its config.json."
        )
    for name in ("shift_factor", "latents_mean", "latents_std"):
        value = config.get(name)
        if value is not None and value != 0:
            raise InputError(
                f"{origin}: {name} is {shortened(repr(value))}; expected none, since Stable Diffusion's latents are "
                "only scaled; choose another VAE."
            )
