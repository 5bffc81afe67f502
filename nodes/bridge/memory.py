"""What a training needs of memory, and how it shares it with ComfyUI."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch

from ...echodistill_core.errors import InputError
from ...echodistill_core.perception.load import Place
from ...echodistill_core.settings import TrainSettings
from ...echodistill_core.training.state import DTYPES

GB = 1024**3
MASTER_BYTES = 16  # of each number that learns: its value, its gradient and AdamW's two moments, in float32


def default_precision(device: torch.device) -> str:
    """bf16 where the device computes in it, fp32 elsewhere and on CPUs, where it is slower."""
    if device.type == "cpu" or not mm.should_use_bf16(device):
        return "fp32"
    return "bf16"


def least_bytes(
    models: Sequence[Any], learning: int, places: Iterable[Place], settings: TrainSettings, device: torch.device
) -> int:
    """Bytes that weights and optimisers take of the device's memory at least; activations come on top.

    models: the ModelPatchers of student, teacher, CLIP and VAE. learning: how many numbers learn, over all roles.
    """
    dtype = DTYPES[settings.precision]
    weights = [p for patcher in models for p in patcher.model.parameters()]
    files = sum(size(p) for place in places for p in (place.encoder, place.projector) if p is not None)
    # Backbones' files hold float32 as they are published.
    total = sum(p.numel() for p in weights) * dtype.itemsize + files * dtype.itemsize // 4 + learning * MASTER_BYTES
    if device.type == "cpu":
        # The copies of the user's weights lie in the same memory, beside what was cast from them.
        total += sum(p.numel() * p.element_size() for p in weights if p.dtype != dtype)
    return total


def size(path: Path) -> int:
    """Bytes of a file, or of the weights in a folder."""
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


@contextmanager
def room_for(needed: int, device: torch.device, settings: TrainSettings) -> Iterator[str]:
    """Have ComfyUI free so many bytes on the device for the block, and give them back after it.

    Yields what is needed and what is free, in words. Raises InputError where weights alone would not fit.
    """
    mm.free_memory(needed, device)
    mm.soft_empty_cache()
    free = mm.get_free_memory(device)
    words = f"at least {needed / GB:.1f} GB for weights and optimisers, {free / GB:.1f} GB free on {device}"
    if needed > free:
        halves = "precision bf16 halves that" if settings.precision == "fp32" and device.type != "cpu" else ""
        small = "dinov2_backbone dinov2-small saves 0.6 to 1.1 GB" if settings.dinov2_backbone == "dinov2" else ""
        remedies = "; ".join(filter(None, (halves, small, "close other programs, or take a machine with more memory")))
        raise InputError(f"there is not enough memory to train: {words}; {remedies}.")
    try:
        yield words
    finally:
        gc.collect()
        mm.soft_empty_cache()
