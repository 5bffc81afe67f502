"""How much memory training takes, and what to do where there is too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import EchoDistillError
from ..settings import TrainSettings

GIB = 2**30
# Counted by benchmarks.memory --counted for SD 2.1 and SD-Turbo with three critics in bf16 at 512 pixels: everything,
# and activations alone, for each image that is computed at once.
COUNTED_GIB = {"normal": 14.7, "low": 5.7}
ACTIVATIONS_GIB = {"normal": 4.1, "low": 0.8}


class OutOfMemoryError(EchoDistillError, torch.OutOfMemoryError):
    """Memory ran out while training. The run goes on from its last checkpoint."""


def activation_bytes(settings: TrainSettings, resolution: int) -> int:
    """About how many bytes a training holds at the most besides weights and optimisers."""
    images = settings.batch_size if settings.memory_mode == "normal" else 1
    wide = 2 if settings.precision == "fp32" else 1
    return int(ACTIVATIONS_GIB[settings.memory_mode] * GIB * wide * images * (resolution / 512) ** 2)


def advice(settings: TrainSettings) -> str:
    """What to change so that a training that ran out of memory fits: what keeps the run, then what makes another."""
    keeping = "with other programs closed"
    if settings.memory_mode == "normal":
        low, normal = (f"{COUNTED_GIB[mode]:.0f}" for mode in ("low", "normal"))
        fits = f"about {low} GB for Stable Diffusion at 512 pixels in bf16, in place of {normal}"
        keeping = f"with memory_mode low ({fits}) or {keeping}"
    another = ["a smaller resolution"]
    if settings.precision == "fp32":
        another.append("precision bf16")
    if settings.dinov2_backbone == "dinov2" and settings.critic_weights.get("dinov2"):
        another.append("dinov2_backbone dinov2-small")
    if settings.memory_mode == "normal" and settings.batch_size > 1:
        another.append("batch_size 1")
    return (
        f"the same run goes on from its last checkpoint, {keeping}; another run takes less with {' or '.join(another)}."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # A CPU's and MPS's allocators raise no exception of their own, nor do CUDA's libraries.
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def explaining_out_of_memory(settings: TrainSettings) -> Iterator[None]:
    """Raise OutOfMemoryError with advice where memory runs out in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemoryError(f"memory ran out ({first}); {advice(settings)}") from error
