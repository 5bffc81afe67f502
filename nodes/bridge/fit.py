"""Fingerprints of the MODEL, CLIP and VAE objects, and the check that an adapter was trained on them."""

from __future__ import annotations

from typing import Any

from ...echodistill_core.adapter.apply import base_mismatch, block_mismatch, check_base, check_role
from ...echodistill_core.adapter.file import Adapter
from ...echodistill_core.models.checkpoint import read_checkpoint
from ...echodistill_core.models.fingerprint import (
    block_fingerprints,
    fingerprint,
    sampled_fingerprint,
    unet_fingerprint,
)
from ...echodistill_core.training.identity import DenoiserIdentity, models_identity
from .kinds import architecture_of, prediction_of
from .sockets import Models
from .weights import UNET_PREFIX, cached, network_tensors, text_prefix

REMEDY = "connect that one, or switch on any_base"


def check_fit(adapter: Adapter, model: Any, clip: Any, *, any_base: bool) -> str:
    """Raise InputError unless the adapter fits these objects: their shapes and, without any_base, their weights.

    The weights may match with or without patches: a LoRA or another adapter applied before this one is allowed, and so
    is one that was already applied in training. Returns a warning if only layers differ that the adapter does not
    change, otherwise "".
    """
    architecture = architecture_of(model)
    check_role(adapter, adapter.role, architecture.text_width)
    if any_base:
        return base_mismatch(adapter, keys_and_values(model, clip)) and base_mismatch(
            adapter, keys_and_values(model, clip, patches=False)
        )
    name = f"{adapter.role} MODEL"
    for key, compute in (("base_fingerprint", keys_and_values), ("text_fingerprint", text_encoder)):
        if adapter.metadata[key] != compute(model, clip):
            check_base(adapter, {key: compute(model, clip, patches=False)}, name, REMEDY)
    # Without patches first, because that needs no computation of patched weights.
    return block_mismatch(adapter, _blocks(model, patches=False)) and block_mismatch(
        adapter, _blocks(model, patches=True)
    )


def identity_of(models: Models) -> dict[str, str]:
    """The models' part of a run's identity, equal to the core's for a family built from them."""
    student, teacher = (
        DenoiserIdentity(keys_and_values(model, models.clip), _weights(model), prediction_of(model, socket))
        for model, socket in ((models.student, "student"), (models.teacher, "teacher"))
    )
    return models_identity(student, teacher, text_encoder(models.teacher, models.clip), _vae(models))


def keys_and_values(model: Any, clip: Any, *, patches: bool = True) -> str:
    """The fingerprint of a MODEL's cross-attention keys and values, with or without patches; cached."""

    def compute() -> str:
        unet = network_tensors(model, UNET_PREFIX, copy=False, patches=patches, part=".attn2.to_").tensors
        return unet_fingerprint(read_checkpoint({"unet": unet}).unet)

    return _cached(model, "keys and values", patches, compute)


def text_encoder(model: Any, clip: Any, *, patches: bool = True) -> str:
    """The fingerprint of a CLIP's text encoder, of the layers that the MODEL uses; cached."""

    def compute() -> str:
        unet = network_tensors(model, UNET_PREFIX, copy=False, patches=False).tensors
        text = network_tensors(clip.patcher, text_prefix(clip), copy=False, patches=patches).tensors
        return fingerprint(read_checkpoint({"unet": unet, "text_encoder": text}).text_encoder)

    return _cached(clip.patcher, "text encoder", patches, compute)


def _blocks(model: Any, *, patches: bool) -> dict[str, str]:
    def compute() -> dict[str, str]:
        unet = network_tensors(model, UNET_PREFIX, copy=False, patches=patches).tensors
        return block_fingerprints(read_checkpoint({"unet": unet}).unet)

    return _cached(model, "blocks", patches, compute)


def _weights(model: Any) -> str:
    def compute() -> str:
        unet = network_tensors(model, UNET_PREFIX, copy=False).tensors
        return sampled_fingerprint(read_checkpoint({"unet": unet}).unet)

    return _cached(model, "weights", True, compute)


def _vae(models: Models) -> str:
    def compute() -> str:
        unet = network_tensors(models.student, UNET_PREFIX, copy=False, patches=False).tensors
        vae = network_tensors(models.vae.patcher, copy=False).tensors
        return sampled_fingerprint(read_checkpoint({"unet": unet, "vae": vae}).vae)

    return _cached(models.vae.patcher, "vae", True, compute)


def _cached(patcher: Any, name: str, patches: bool, compute: Any) -> Any:
    return cached(patcher, (name, patcher.patches_uuid if patches else None), compute)
