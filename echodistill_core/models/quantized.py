"""Quantised weights: 8-bit floats with ComfyUI's scales are dequantised, every other form is refused by name.

ComfyUI stores weight = float8 * scale, with the scale of `<layer>.weight` as a single number `<layer>.scale_weight`
and an empty `scaled_fp8` that marks the file, or, from 0.4 on, `<layer>.weight_scale` with the format as JSON in
`<layer>.comfy_quant` or in the metadata's `_quantization_metadata` (comfy/utils.py, comfy/ops.py, comfy/quant_ops.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..messages import shortened

_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_SCALE = re.compile(r"^(.+\.)(?:scale_weight|weight_scale)$", re.DOTALL)
_FORMAT = re.compile(r"(^|\.)comfy_quant$")
# Scales of a layer's input, for 8-bit matrix products; the weights do not depend on them.
_INPUT_SCALE = re.compile(r"\.(scale_input|input_scale)$")
_UNKNOWN_SCALE = re.compile(r"scale|amax|quant", re.IGNORECASE)
_MARK = re.compile(r"(^|\.)scaled_fp8$")
_FOREIGN = (
    (re.compile(r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$|\.weight_format$"), "bitsandbytes"),
    (re.compile(r"\.(qweight|qzeros|g_idx|scales)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(weight_scale_2|pre_quant_scale|weight_s_rel|weight_s_channel|weight_codebook)$"), "ComfyUI"),
    (re.compile(r"\.(weight_scale_inv|weight_zero_point|weight_packed|weight_shape)$"), "compressed-tensors"),
    (re.compile(r"\.weight\._(data|scale|shift|zeropoint)$|\._weight_(qdata|scale)$|:_?data$"), "quanto or torchao"),
)
_NETWORKS = ("model.diffusion_model.", "first_stage_model.", "")
_EXPECTED = (
    "expected float32, float16, bfloat16 or float8 weights, or float8 with ComfyUI's scales; take the file without "
    "quantisation"
)


def refuse_quantized_config(config: Mapping[str, Any], origin: str) -> None:
    """Raise InputError for a configuration with quantised weights."""
    stated = config.get("quantization_config")
    if stated:
        method = stated.get("quant_method", "quantised") if isinstance(stated, Mapping) else stated
        raise InputError(f"{origin} states quantised weights (quantization_config, {shortened(method)}); {_EXPECTED}.")


def dequantized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], origin: str) -> Mapping[str, Tensor]:
    """The tensors with each scale multiplied into its weight, without scales and format markers.

    Tensors without a scale are returned as they are. Products are computed in float32 and stored in the precision of
    the network's other weights, at least 16 bits. Raises InputError for other forms of quantisation, a scale that is
    not one positive number, and a scale without its weight.
    """
    for name in tensors:
        for pattern, whose in _FOREIGN:
            if pattern.search(name):
                raise InputError(
                    f"{origin}: tensor {shortened(name)} belongs to weights quantised by {whose}; {_EXPECTED}."
                )
    _check_formats(tensors, metadata, origin)
    _refuse_unknown_scales(tensors, origin)
    scales: dict[str, str] = {}
    for name in tensors:
        match = _SCALE.match(name)
        if match is not None:
            weight = f"{match[1]}weight"
            if weight in scales and not torch.equal(tensors[name], tensors[scales[weight]]):
                raise InputError(
                    f"{origin}: {shortened(weight)} has two scales that differ, {shortened(scales[weight])} and "
                    f"{shortened(name)}; expected one; download the checkpoint again."
                )
            scales[weight] = name
    dropped = {n for n in tensors if _INPUT_SCALE.search(n) or _MARK.search(n) or _FORMAT.search(n) or _SCALE.match(n)}
    if not dropped:
        return tensors
    result = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    kept = {name: t.dtype for name, t in result.items() if name not in scales}
    precision = {prefix: _precision(kept, prefix) for prefix in _NETWORKS}
    for name, scale_name in scales.items():
        scale = _scale(tensors[scale_name], scale_name, origin)
        found = result.get(name)
        if found is None:
            raise InputError(
                f"{origin}: {shortened(scale_name)} scales {shortened(name)}, which is missing; download the "
                "checkpoint again."
            )
        if not found.is_floating_point():
            raise InputError(f"{origin}: tensor {shortened(name)} is {found.dtype} with a scale; {_EXPECTED}.")
        if type(found) not in (Tensor, nn.Parameter):
            continue  # a tensor subclass in memory that applies its scale itself
        prefix = next(p for p in _NETWORKS if name.startswith(p))
        result[name] = (found.detach().float() * scale).to(precision[prefix])
    return result


def _refuse_unknown_scales(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise InputError for an 8-bit weight whose scale has an unknown name: without the scale it would be wrong."""
    layers = {
        name.rpartition(".")[0]: name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1
    }
    for name in tensors if layers else ():
        if any(p.search(name) for p in (_SCALE, _INPUT_SCALE, _MARK, _FORMAT)):
            continue
        layer, _, leaf = name.rpartition(".")
        outer, _, inner = layer.rpartition(".")
        weight = layers.get(layer) if _UNKNOWN_SCALE.search(leaf) else None
        if weight is None and _UNKNOWN_SCALE.search(f"{inner}.{leaf}"):
            weight = layers.get(outer)
        if weight is not None:
            raise InputError(
                f"{origin}: tensor {shortened(name)} scales the 8-bit weight {shortened(weight)} in a form that is not "
                f"known; {_EXPECTED}."
            )


def _precision(kept: Mapping[str, torch.dtype], prefix: str) -> torch.dtype:
    found: torch.dtype | None = None
    for name, dtype in kept.items():
        if name.startswith(prefix) and dtype.is_floating_point and dtype.itemsize > 1:
            found = dtype if found is None else torch.promote_types(found, dtype)
    return found or torch.float16


def _scale(scale: Tensor, name: str, origin: str) -> float:
    is_one = scale.numel() == 1 and scale.is_floating_point()
    value = float(scale.detach().float().reshape(-1)[0]) if is_one else 0.0
    if not 0 < value < float("inf"):
        which = f" and value {value:.4g}" if is_one else ""
        raise InputError(
            f"{origin}: the scale {shortened(name)} has shape {shortened(tuple(scale.shape))}, type {scale.dtype}"
            f"{which}; expected one positive number; take the file without quantisation."
        )
    return value


def _check_formats(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], origin: str) -> None:
    """Raise InputError for a layer format other than an 8-bit float with one scale."""
    formats: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if _FORMAT.search(name):
            formats[name] = _parsed(bytes(tensor.detach().to("cpu", torch.uint8).reshape(-1).tolist()))
    stated = metadata.get("_quantization_metadata")
    if stated is not None:
        parsed = _parsed(stated.encode("utf-8", "replace"))
        layers = parsed.get("layers") if isinstance(parsed, dict) else None
        formats.update(layers if isinstance(layers, dict) else {"_quantization_metadata": None})
    for name, layer in formats.items():
        found = layer.get("format") if isinstance(layer, dict) else None
        if found not in _FORMATS:
            raise InputError(f"{origin}: {shortened(name)} is quantised as {shortened(repr(found))}; {_EXPECTED}.")


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
