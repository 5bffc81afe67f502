"""What a training needs of memory, and how it shares it with ComfyUI."""

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
MASTER_BYTES = 16  # of each number that learns: its value, its gradient and AdamW's two moments, in float32


def default_precision(device: torch.device) -> str:
    """bf16 where the device computes in it, fp32 elsewhere and on CPUs, where it is slower."""
    if device.type == "cpu" or not mm.should_use_bf16(device):
        return "fp32"
    return "bf16"


def least_bytes(
    models: Sequence[Any],
    learning: int,
    backbone_files: Iterable[BackboneFiles],
    settings: TrainSettings,
    device: torch.device,
) -> int:
    """Bytes that weights and optimisers take of the device's memory at least; activations come on top.

    models: the ModelPatchers of student, teacher, CLIP and VAE. learning: how many numbers learn, over all roles.
    """
    dtype = DTYPES[settings.precision]
    if settings.memory_mode == "low" and device.type not in ONE_MEMORY:
        models = models[1:]  # one UNet at a time
    weights = [p for patcher in models for p in patcher.model.parameters()]
    files = sum(size(p) for place in backbone_files for p in (place.encoder, place.projector) if p is not None)
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
def free_memory_for(needed: int, device: torch.device, settings: TrainSettings, resolution: int) -> Iterator[str]:
    """Have ComfyUI free the device's memory for the block, and give it back after it.

    needed: bytes of weights and optimisers. resolution: of the training images, for what activations take.
    Yields what is needed and what is free, in words. Raises InputError where weights alone would not fit.
    """
    all_in_all = needed + activation_bytes(settings, resolution)
    mm.free_memory(all_in_all, device)
    mm.soft_empty_cache()
    free = mm.get_free_memory(device)
    words = (
        f"about {all_in_all / GB:.1f} GB, of which {needed / GB:.1f} GB for weights and optimisers, "
        f"{free / GB:.1f} GB free on {device}"
    )
    if needed > free:
        raise InputError(f"there is not enough memory to train: {words}; {'; '.join(_remedies(settings, device))}.")
    if all_in_all > free and settings.memory_mode == "normal":
        words += "; where that runs out, memory_mode low takes less"
    try:
        yield words
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
