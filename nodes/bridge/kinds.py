"""Detects the architecture, family and prediction type of the models in sockets."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.model_sampling
import torch
from comfy.pixel_space_convert import PixelspaceConversionVAE

from ...echodistill_core.errors import InputError
from ...echodistill_core.models.architectures import STABLE_DIFFUSION_NOISE, Architecture
from ...echodistill_core.models.checkpoint import read_checkpoint, schedule_of
from ...echodistill_core.models.finite import check_finite
from ...echodistill_core.models.sources import ModelSources, family_name
from .sockets import Models
from .weights import UNET_PREFIX, cached, embedding_table, network_tensors

# Covers the rounding between ComfyUI's and diffusers' schedules; zero-SNR and shifted schedules differ by more.
SCHEDULE_TOLERANCE = 1e-4


def architecture_of(model: Any) -> Architecture:
    """The architecture of a MODEL's UNet. Raises InputError for an unsupported one, naming its likely type."""

    def detect() -> Architecture:
        tensors = network_tensors(model, UNET_PREFIX, copy=False, patches=False).tensors
        return read_checkpoint({"unet": tensors}, origin="the MODEL").architecture

    found: Architecture = cached(model, "architecture", detect)
    return found


def sources_of(models: Models) -> ModelSources:
    """The core's description of these models; it decides the recommended settings and the backbones.

    Raises InputError for a missing part, and for a student, teacher, CLIP or VAE that do not fit each other.
    """
    for name, part in {"student": models.student, "teacher": models.teacher, "CLIP": models.clip}.items():
        if part is None:
            raise _missing(name)
    if _is_missing(models.vae):
        raise _missing("VAE")
    student, teacher = architecture_of(models.student), architecture_of(models.teacher)
    check_vae(models.vae, models.student, "student")
    if student.name != teacher.name:
        raise InputError(
            f"the student is a {student.name} model and the teacher a {teacher.name} one; take both from one family: "
            "SD-Turbo with SD 2.1, or both outputs of Load Miniature."
        )
    width = embedding_table(models.clip).shape[1]
    if width != student.text_width:
        raise InputError(
            f"the CLIP is {width} wide, but student and teacher ({student.name}) read text {student.text_width} wide; "
            "connect the CLIP output of the teacher's or the student's own checkpoint."
        )
    return ModelSources(family=family_name(student, prediction_of(models.teacher, "teacher")))


def check_vae(vae: Any, model: Any, socket: str = "model") -> None:
    """Raise InputError if a VAE's latents do not have the number of channels that a MODEL expects."""
    if _is_missing(vae):
        raise _missing("VAE")
    found, wanted = getattr(vae, "latent_channels", None), model.model.latent_format.latent_channels
    if found is None or found == wanted:
        return
    kind = "pixel_space" if isinstance(vae.first_stage_model, PixelspaceConversionVAE) else "another family's"
    raise InputError(
        f"this VAE ({kind}) has {found} channels, but the {socket} wants {wanted}: connect the VAE output of the "
        f"checkpoint that the {socket} comes from."
    )


def check_vae_finite(vae: Any) -> None:
    """Raise InputError if a VAE's weights contain NaN or infinity, which decode to black or white pictures.

    Each VAE is checked only once.
    """
    check = partial(check_finite, names={}, origin="the VAE")
    cached(vae.patcher, "finite", lambda: check(vae.first_stage_model.state_dict()))


def _is_missing(vae: Any) -> bool:
    return vae is None or getattr(vae, "first_stage_model", None) is None


def _missing(name: str) -> InputError:
    return InputError(f"the {name} is missing: the file it was loaded from holds none; connect another loader's.")


def prediction_of(model: Any, socket: str) -> str:
    """A MODEL's prediction type in the core's terms: of its sampling object, which ModelSamplingDiscrete replaces.

    Raises InputError for another kind of model and for a schedule that is not Stable Diffusion's.
    """
    sampling = model.get_model_object("model_sampling")
    # X0, EDM and V_PREDICTION are subclasses of EPS, so the order matters.
    kinds = (
        (comfy.model_sampling.X0, "sample"),
        (comfy.model_sampling.EDM, ""),
        (comfy.model_sampling.V_PREDICTION, "v_prediction"),
        (comfy.model_sampling.EPS, "epsilon"),
    )
    prediction = next((name for kind, name in kinds if isinstance(sampling, kind)), "")
    sigmas = getattr(sampling, "sigmas", None)
    expected = schedule_of(STABLE_DIFFUSION_NOISE, "epsilon").alphas_cumprod
    found = None if sigmas is None else 1 / (1 + sigmas.detach().to("cpu", torch.float64) ** 2)
    if not prediction or found is None or found.shape != expected.shape:
        raise InputError(
            f"the {socket} is sampled as {type(sampling).__mro__[1].__name__}; expected a model of Stable Diffusion "
            "1.5, 2.1 or Turbo, which predicts noise, velocity or the image over 1000 timesteps."
        )
    if float((found - expected).abs().max()) > SCHEDULE_TOLERANCE:
        raise InputError(
            f"the {socket} has a noise schedule that is not Stable Diffusion's; take away ModelSamplingDiscrete's zsnr "
            "and other changes of the schedule before training."
        )
    return prediction
