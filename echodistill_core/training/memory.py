"""The memory that training needs, and advice for running out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import EchoDistillError
from ..settings import TrainSettings

GIB = 2**30
# Counted by benchmarks.memory --counted for SD 2.1 and SD-Turbo with three critics in bf16 at 512 pixels, in GiB by
# memory_mode: total memory, and activations for each image of a forward pass.
COUNTED_GIB = {"normal": 14.7, "low": 5.7}
ACTIVATIONS_GIB = {"normal": 4.1, "low": 0.8}


class OutOfMemoryError(EchoDistillError, torch.OutOfMemoryError):
    """Memory ran out while training. The run can be resumed at its last checkpoint."""


def activation_bytes(settings: TrainSettings, resolution: int) -> int:
    """Estimated peak memory of training in bytes, without weights and optimiser state.

    resolution: side of the training images in pixels.
    """
    images = settings.batch_size if settings.memory_mode == "normal" else 1
    width_factor = 2 if settings.precision == "fp32" else 1
    return int(ACTIVATIONS_GIB[settings.memory_mode] * GIB * width_factor * images * (resolution / 512) ** 2)


def advice(settings: TrainSettings) -> str:
    """Advice for a training that ran out of memory: changes that resume the run, and settings for a new run."""
    same_run = "with other programs closed"
    if settings.memory_mode == "normal":
        low, normal = (f"{COUNTED_GIB[mode]:.0f}" for mode in ("low", "normal"))
        fits = f"about {low} GB for Stable Diffusion at 512 pixels in bf16, in place of {normal}"
        same_run = f"with memory_mode low ({fits}) or {same_run}"
    new_run = ["a smaller resolution"]
    if settings.precision == "fp32":
        new_run.append("precision bf16")
    if settings.dinov2_backbone == "dinov2" and settings.critic_weights.get("dinov2"):
        new_run.append("dinov2_backbone dinov2-small")
    if settings.memory_mode == "normal" and settings.batch_size > 1:
        new_run.append("batch_size 1")
    return (
        f"the same run goes on from its last checkpoint, {same_run}; a new run needs less with {' or '.join(new_run)}."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The allocators of CPU and MPS, and CUDA's libraries, raise a RuntimeError without a class of its own.
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def reraise_out_of_memory(settings: TrainSettings) -> Iterator[None]:
    """Turn an exception of the block that reports exhausted memory into OutOfMemoryError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemoryError(f"memory ran out ({first}); {advice(settings)}") from error
