"""The noise schedule of a diffusers scheduler configuration, with checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..diffusion import PREDICTION_TYPES, NoiseSchedule
from ..errors import InputError
from ..messages import shortened

TIMESTEPS = 1000  # in every Stable Diffusion and in ComfyUI's samplers
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
# diffusers' schedulers without betas: flow matching, EDM, and processes on tokens.
_OTHER_PROCESSES = ("FlowMatch", "EDM", "CosineDPM", "VQDiffusion", "Amused", "ScoreSde")
_OPTIONS = "--student-prediction or --teacher-prediction"


def schedule_of(scheduler: Mapping[str, Any], prediction: str, origin: str = "the scheduler") -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler configuration, for a UNet with this prediction type.

    abar (alphas_cumprod) decreases strictly within (0, 1]. With zero terminal SNR (rescale_betas_zero_snr) it ends at
    0. There z is pure noise: v_prediction gives x0 = sqrt(abar) z - sqrt(1 - abar) v = -v and sample gives x0, but
    epsilon gives x0 = (z - epsilon) / 0 and is refused.
    Raises InputError naming `origin` for a configuration without such a schedule.
    """
    if not isinstance(prediction, str) or prediction not in PREDICTION_TYPES:
        raise InputError(
            f"{origin}: prediction type {shortened(repr(prediction))} is unknown; expected one of "
            f"{', '.join(PREDICTION_TYPES)}; choose another checkpoint, or say what it predicts with {_OPTIONS}."
        )
    abar = _alphas_cumprod(scheduler, origin)
    if len(abar) != TIMESTEPS:
        raise InputError(
            f"{origin}: the noise schedule has {len(abar)} timesteps (num_train_timesteps, trained_betas); expected "
            f"{TIMESTEPS}, as every Stable Diffusion has; choose another checkpoint."
        )
    falls = bool((abar[1:] < abar[:-1]).all())  # False where any is NaN
    if not (falls and 0 < abar[0] <= 1 and abar[-1] >= 0):
        raise InputError(
            f"{origin}: alphas_cumprod of the noise schedule runs from {float(abar[0]):.6g} to {float(abar[-1]):.6g}, "
            "or not downwards; expected numbers that fall strictly and lie in (0, 1]; correct its betas."
        )
    if abar[-1] == 0 and prediction == "epsilon":
        raise InputError(
            f"{origin}: alphas_cumprod is 0 at the last timestep (rescale_betas_zero_snr, ztsnr), from which a "
            "prediction of epsilon cannot give an image; expected v_prediction, or a schedule without zero terminal "
            f"SNR; correct the file, or say with {_OPTIONS} what the model predicts."
        )
    return NoiseSchedule(abar, prediction)


def _alphas_cumprod(scheduler: Mapping[str, Any], origin: str) -> Tensor:
    name = str(scheduler.get("_class_name", ""))
    if name.startswith(_OTHER_PROCESSES):
        raise InputError(
            f"{origin}: {shortened(name)} is a scheduler of another noise process; expected one of betas over "
            f"{TIMESTEPS} timesteps, as DDPMScheduler or DDIMScheduler; choose another checkpoint."
        )
    if scheduler.get("use_flow_sigmas"):
        raise InputError(
            f"{origin}: use_flow_sigmas states flow matching; expected a schedule of betas, as DDPMScheduler has; "
            "choose another checkpoint."
        )
    kind = scheduler.get("beta_schedule", "linear")
    if scheduler.get("trained_betas") is None and kind not in BETA_SCHEDULES:
        raise InputError(
            f"{origin}: beta_schedule {shortened(repr(kind))} is unknown; expected one of {', '.join(BETA_SCHEDULES)}; "
            "choose another checkpoint."
        )
    steps = scheduler.get("num_train_timesteps", TIMESTEPS)
    if type(steps) is not int or steps != TIMESTEPS:
        raise InputError(
            f"{origin}: num_train_timesteps is {shortened(repr(steps))}; expected {TIMESTEPS}, as every Stable "
            "Diffusion has; choose another checkpoint."
        )
    try:
        abar = DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod
        assert isinstance(abar, Tensor)
    except Exception as error:  # diffusers raises many types on malformed values
        raise InputError(
            f"{origin}: no noise schedule can be made of it ({shortened(error)}); expected diffusers' "
            "scheduler_config.json; download the checkpoint again."
        ) from error
    if abar.ndim != 1 or len(abar) == 0:
        raise InputError(f"{origin}: trained_betas is no list of {TIMESTEPS} numbers; correct it.")
    return abar.to(torch.float32)
