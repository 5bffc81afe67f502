"""Fingerprints of weights: whether two models are the same, and in which blocks they differ.

Values are rounded to half precision, so that a model's float32 file and its float16 file are the same model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# Samples of a tensor: this many runs of neighbouring values, evenly spaced from the first value to the last.
RUNS = 8
RUN_LENGTH = 32


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of SHA-256 over names, shapes and all values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name], tensors[name])
    return digest.hexdigest()[:16]


def unet_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of the cross-attention keys and values, which adapters change, of a UNet in diffusers' names."""
    return fingerprint({n: t for n, t in tensors.items() if ".attn2.to_k." in n or ".attn2.to_v." in n})


def sampled_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of SHA-256 over names, shapes, and 256 values of every tensor.

    Detects models that differ in whole layers, as after fine-tuning or merging a LoRA, without hashing gigabytes. A
    change of single values between the samples is not detected.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name], _sample(tensors[name]))
    return digest.hexdigest()[:16]


def block_fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`sampled_fingerprint` of each block of a UNet in diffusers' names: "conv_in", "down_blocks.0", ..."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, second, *_ = name.split(".")
        blocks.setdefault(f"{first}.{second}" if second.isdigit() else first, {})[name] = tensor
    return {block: sampled_fingerprint(own) for block, own in sorted(blocks.items())}


def differing_blocks(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """The blocks whose fingerprints differ, or that only one of the two models has."""
    return sorted(block for block in {*there, *here} if there.get(block) != here.get(block))


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= RUNS * RUN_LENGTH:
        return flat
    last = flat.numel() - RUN_LENGTH
    starts = [last * i // (RUNS - 1) for i in range(RUNS)]
    return torch.cat([flat[start : start + RUN_LENGTH] for start in starts])


def _add(digest: hashlib._Hash, name: str, tensor: Tensor, values: Tensor) -> None:
    digest.update(f"{name}{tuple(tensor.shape)}".encode())
    digest.update(values.detach().to("cpu", torch.float16).contiguous().numpy().data)
