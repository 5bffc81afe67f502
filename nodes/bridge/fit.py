"""Whether an adapter was trained on the very models that are to wear it."""

from __future__ import annotations

from typing import Any

from ...echodistill_core.adapter.apply import check_base, check_role
from ...echodistill_core.adapter.file import Adapter
from ...echodistill_core.models.checkpoint import read_checkpoint
from ...echodistill_core.models.family import fingerprint, unet_fingerprint
from .kinds import architecture_of
from .weights import UNET_PREFIX, network_tensors, once, text_prefix

REMEDY = "connect that one, or switch on any_base"


def check_fit(adapter: Adapter, model: Any, clip: Any, *, any_base: bool) -> None:
    """Raise InputError unless the adapter fits these objects: their shapes and, without any_base, their weights.

    A LoRA or another adapter between checkpoint and adapter makes no other base, nor does one that was there in
    training.
    """
    architecture = architecture_of(model)
    check_role(adapter, adapter.role, architecture.text_width)
    if any_base:
        return
    name = f"{adapter.role} MODEL"
    for key, what in (("base_fingerprint", "unet"), ("text_fingerprint", "text_encoder")):
        if adapter.metadata[key] != fingerprint_of_weights(what, model, clip):
            check_base(adapter, {key: fingerprint_of_weights(what, model, clip, patches=False)}, name, REMEDY)


def fingerprint_of_weights(what: str, model: Any, clip: Any, *, patches: bool = True) -> str:
    """As the core takes it, of the "unet" or the "text_encoder", with or without patches; computed once for each."""

    def compute() -> str:
        unet = network_tensors(model, UNET_PREFIX, copy=False, patches=patches, part=".attn2.to_").tensors
        if what == "unet":
            return unet_fingerprint(read_checkpoint({"unet": unet}).unet)
        text = network_tensors(clip.patcher, text_prefix(clip), copy=False, patches=patches).tensors
        return fingerprint(read_checkpoint({"unet": unet, "text_encoder": text}).text_encoder)

    patcher = model if what == "unet" else clip.patcher
    found: str = once(patcher, (what, patcher.patches_uuid if patches else None), compute)
    return found
