"""Networks of an architecture on the meta device, and assigning a checkpoint's tensors to them without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import InputError
from ..messages import shortened
from .architectures import Architecture, looks_like, shapes_of

StateDict = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def _building(architecture: Architecture, part: str) -> Iterator[None]:
    try:
        with torch.device("meta"):
            yield
    except Exception as error:  # the constructors of diffusers and transformers raise many types
        raise InputError(
            f"no {part} can be built from the configuration of {shortened(architecture.name)} ({shortened(error)}); "
            "download the checkpoint again or choose another."
        ) from error


def empty_unet(architecture: Architecture) -> UNet2DConditionModel:
    """The UNet on the meta device, without weights."""
    with _building(architecture, "unet"):
        return UNet2DConditionModel.from_config(architecture.unet)


def empty_vae(architecture: Architecture) -> AutoencoderKL:
    """The VAE on the meta device, without weights."""
    with _building(architecture, "vae"):
        return AutoencoderKL.from_config(architecture.vae)


def empty_text_encoder(architecture: Architecture) -> CLIPTextModel:
    """The text encoder on the meta device, without weights. Its position buffer is on the CPU."""
    with _building(architecture, "text_encoder"):
        model = CLIPTextModel(CLIPTextConfig.from_dict(architecture.text_encoder))
    # position_ids is not in a state dictionary, so it would stay on the meta device and give wrong features.
    embeddings = getattr(model, "text_model", model).embeddings
    positions = torch.arange(architecture.text_encoder["max_position_embeddings"])[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    return model


def assemble(module: Module, tensors: StateDict, origin: str) -> Module:
    """Assign tensors to a module on the meta device, without a copy.

    Raises InputError naming the first tensor that is missing, superfluous, of another shape or of an integer type.
    """
    expected = module.state_dict()
    # transformers before version 5 writes text_model. before every name of a CLIPTextModel.
    prefix = "text_model." if next(iter(expected)).startswith("text_model.") else ""
    # Detached: otherwise freezing the module would freeze the caller's parameters. Inference tensors, as ComfyUI's
    # loaders make them, cannot take part in autograd; their copies can.
    given = {prefix + n: t.clone() if t.is_inference() else t.detach() for n, t in tensors.items()}
    missing = [n for n in expected if n not in given]
    unexpected = [n for n in given if n not in expected]
    if missing or unexpected:
        raise InputError(
            f"{origin} does not fit its architecture: {len(missing)} tensors are missing"
            f"{f' (the first is {shortened(missing[0])})' if missing else ''} and {len(unexpected)} are superfluous"
            f"{f' (the first is {shortened(unexpected[0])})' if unexpected else ''}; it looks like "
            f"{looks_like(shapes_of(tensors))}. Download the checkpoint again or choose another."
        )
    for name, like in expected.items():
        if given[name].shape != like.shape:
            raise InputError(
                f"{origin}: tensor {name} has shape {shortened(tuple(given[name].shape))}; expected "
                f"{tuple(like.shape)}. It belongs to another architecture."
            )
        if like.is_floating_point() and not given[name].is_floating_point():
            raise InputError(
                f"{origin}: tensor {name} has the type {given[name].dtype}; expected floating-point numbers; it may be "
                "quantised: take the checkpoint without quantisation."
            )
    module.load_state_dict(given, assign=True)
    return module
