"""Weights and names of what is in MODEL, CLIP and VAE sockets. The user's objects are read, never changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.lora
import torch
from torch import Tensor

from ...echodistill_core.errors import InputError

UNET_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class Tensors:
    """A network's tensors on the CPU, copies of the user's, patches included. patched: how many had patches."""

    tensors: dict[str, Tensor]
    patched: int


def network_tensors(
    patcher: Any, prefix: str = "", *, copy: bool = True, patches: bool = True, part: str = ""
) -> Tensors:
    """A ModelPatcher's weights under their names without `prefix`.

    copy: ordinary tensors of one's own on the CPU, which can be trained; otherwise the user's very tensors, to look at.
    patches: with what Load LoRA and others added, as sampling would use them; False takes the checkpoint's own.
    part: a part of the names of those that are wanted with patches; "" for all.
    The network's state dictionary would hold whichever clone's patches were loaded last.
    """
    result: dict[str, Tensor] = {}
    patched = 0
    # Loader nodes run in inference mode; a copy made outside of it is an ordinary tensor.
    with torch.inference_mode(False):
        # Of each entry, the first is the weight without patches and how to convert it; the others are patches.
        for key, ((weight, convert), *rest) in patcher.get_key_patches(prefix or None).items():
            if key.endswith(_SCALES):
                continue
            tensor = _dequantised(weight.detach(), convert)
            if rest and patches and part in key:
                patched += 1
                changed = comfy.lora.calculate_weight(rest, tensor.to("cpu", torch.float32, copy=True), key)
                result[key.removeprefix(prefix)] = changed.to(tensor.dtype)
            else:
                result[key.removeprefix(prefix)] = tensor.to("cpu", copy=True) if copy else tensor
    return Tensors(result, patched)


# What ComfyUI keeps beside a weight of 8 bits or less; its own function multiplies it in.
_SCALES = (
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".comfy_quant",
    "scaled_fp8",
)


def _dequantised(weight: Tensor, convert: Callable[..., Tensor]) -> Tensor:
    """A weight in the values that sampling computes with: an 8-bit one times its scale, in half precision.

    convert: ComfyUI's function of the layer that the weight belongs to; other weights are returned as they are.
    """
    if weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return convert(weight.to("cpu", torch.float32, copy=True), inplace=True).half()
    if type(weight) not in (Tensor, torch.nn.Parameter):  # a quantised tensor of ComfyUI's own
        return convert(weight).to("cpu")
    return weight


def clip_name(clip: Any) -> str:
    """Which text encoder a CLIP socket holds: "clip_h" (SD 2.x) or "clip_l" (SD 1.x).

    Raises InputError for the text encoders of other families.
    """
    model = clip.cond_stage_model
    name = str(getattr(model, "clip", ""))
    if name not in ("clip_h", "clip_l") or not hasattr(model, name):
        raise InputError(
            f"the CLIP is a {type(model).__name__}; expected the CLIP output of Load Checkpoint with SD-Turbo, SD 2.1 "
            "or SD 1.5, or of Load Miniature."
        )
    return name


def text_prefix(clip: Any) -> str:
    """What the names of a CLIP's text encoder begin with. Raises InputError as `clip_name` does."""
    return f"{clip_name(clip)}.transformer."


def embedding_table(clip: Any) -> Tensor:
    """The vocabulary's embeddings of a CLIP, (49408, width). Raises InputError as `clip_name` does."""
    table: Tensor = getattr(clip.cond_stage_model, clip_name(clip)).transformer.get_input_embeddings().weight
    return table


# Hashing a text encoder takes most of a second, and a strength slider would pay it at every touch.
_known: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def once(patcher: Any, key: Any, compute: Callable[[], Any]) -> Any:
    """compute(), or what it gave before for this ModelPatcher's network and key."""
    known = _known.setdefault(patcher.model, {})
    if key not in known:
        known[key] = compute()
    return known[key]
