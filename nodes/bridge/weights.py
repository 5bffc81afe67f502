"""Reads weights and names from MODEL, CLIP and VAE objects, without changing them."""

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
    """A network's tensors by name. patched: how many of them had patches applied."""

    tensors: dict[str, Tensor]
    patched: int


def network_tensors(
    patcher: Any, prefix: str = "", *, copy: bool = True, patches: bool = True, part: str = ""
) -> Tensors:
    """A ModelPatcher's weights under their names without `prefix`.

    copy: return trainable copies on the CPU; False returns the user's own tensors, for reading only.
    patches: apply the patches of Load LoRA and other nodes, as sampling does; False returns the checkpoint's weights.
    part: apply patches only to names that contain it; "" for all.
    Not read from the network's state dictionary, which holds the patches of the clone that was loaded last.
    """
    result: dict[str, Tensor] = {}
    patched = 0
    # Nodes run in inference mode; copies made outside it can be trained.
    with torch.inference_mode(False):
        # The first item of each entry is the unpatched weight and its conversion function; the others are patches.
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


# Scales that ComfyUI stores next to quantised weights; its conversion function applies them.
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
    """The weight with the values that sampling uses: quantised weights times their scale, fp8 ones in half precision.

    convert: ComfyUI's conversion function of the layer. Other weights are returned unchanged.
    """
    if weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return convert(weight.to("cpu", torch.float32, copy=True), inplace=True).half()
    if type(weight) not in (Tensor, torch.nn.Parameter):  # one of ComfyUI's quantised tensor classes
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
    """The name prefix of the tensors of a CLIP's text encoder. Raises InputError as `clip_name` does."""
    return f"{clip_name(clip)}.transformer."


def embedding_table(clip: Any) -> Tensor:
    """A CLIP's token embedding table, (49408, width). Raises InputError as `clip_name` does."""
    table: Tensor = getattr(clip.cond_stage_model, clip_name(clip)).transformer.get_input_embeddings().weight
    return table


# Hashing a text encoder takes most of a second, too long to repeat for every change of a widget.
_cache: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def cached(patcher: Any, key: Any, compute: Callable[[], Any]) -> Any:
    """compute(), cached by the ModelPatcher's network and by key."""
    entries = _cache.setdefault(patcher.model, {})
    if key not in entries:
        entries[key] = compute()
    return entries[key]
