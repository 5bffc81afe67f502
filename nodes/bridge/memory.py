"""Estimates the memory that training needs, and has ComfyUI free it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch

from ...echodistill_core.devices import DTYPES, ONE_MEMORY
from ...echodistill_core.errors import InputError
from ...echodistill_core.perception.load import BackboneFiles
from ...echodistill_core.settings import TrainSettings
from ...echodistill_core.training.memory import activation_bytes

GB = 1024**3
MASTER_BYTES = 16  # per trainable parameter: value, gradient and AdamW's two moments, in float32


def default_precision(device: torch.device) -> str:
    """bf16 if the device supports it, otherwise fp32; fp32 on CPUs, where bf16 is slower."""
    if device.type == "cpu" or not mm.should_use_bf16(device):
        return "fp32"
    return "bf16"


def least_bytes(
    models: Sequence[Any],
    trainable: int,
    backbone_files: Iterable[BackboneFiles],
    settings: TrainSettings,
    device: torch.device,
) -> int:
    """The least device memory for weights and optimisers, in bytes, without activations.

    models: the ModelPatchers of student, teacher, CLIP and VAE. trainable: number of trainable
    parameters over all roles.
    """
    dtype = DTYPES[settings.precision]
    if settings.memory_mode == "low" and device.type not in ONE_MEMORY:
        models = models[1:]  # one UNet at a time
    weights = [p for patcher in models for p in patcher.model.parameters()]
    files = sum(size(p) for b in backbone_files for p in (b.encoder, b.projector) if p is not None)
    # Published backbone files are float32.
    total = sum(p.numel() for p in weights) * dtype.itemsize + files * dtype.itemsize // 4 + trainable * MASTER_BYTES
    if device.type == "cpu":
        # The copies of the user's weights and the casts made from them are in the same memory.
        total += sum(p.numel() * p.element_size() for p in weights if p.dtype != dtype)
    return total


def size(path: Path) -> int:
    """Size of a file, or of the safetensors files in a folder, in bytes."""
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


@contextmanager
def free_memory_for(needed: int, device: torch.device, settings: TrainSettings, resolution: int) -> Iterator[str]:
    """Have ComfyUI free the device's memory for the block, and release the block's cached memory afterwards.

    needed: bytes of weights and optimisers. resolution: side of the training images in pixels, for the activations.
    Yields a message with needed and free memory. Raises InputError if the weights alone do not fit.
    """
    total = needed + activation_bytes(settings, resolution)
    mm.free_memory(total, device)
    mm.soft_empty_cache()
    free = mm.get_free_memory(device)
    message = (
        f"about {total / GB:.1f} GB, of which {needed / GB:.1f} GB for weights and optimisers, "
        f"{free / GB:.1f} GB free on {device}"
    )
    if needed > free:
        raise InputError(f"there is not enough memory to train: {message}; {'; '.join(_remedies(settings, device))}.")
    if total > free and settings.memory_mode == "normal":
        message += "; where that runs out, memory_mode low takes less"
    try:
        yield message
    finally:
        gc.collect()
        mm.soft_empty_cache()


def _remedies(settings: TrainSettings, device: torch.device) -> list[str]:
    found = []
    if settings.memory_mode == "normal" and device.type not in ONE_MEMORY:
        found.append("memory_mode low keeps one UNet there at a time")
    if settings.precision == "fp32" and device.type != "cpu":
        found.append("precision bf16 halves that")
    if settings.dinov2_backbone == "dinov2":
        found.append("dinov2_backbone dinov2-small saves 0.6 to 1.1 GB")
    return [*found, "close other programs, or take a machine with more memory"]
