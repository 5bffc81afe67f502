"""Devices: lookup by name, supported data types, transfers to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError
from .messages import quoted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONE_MEMORY = ("cpu", "mps")  # device types that share the host's memory, so offloading to the CPU saves nothing


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" prefers CUDA (which includes ROCm), then Apple's MPS.

    Raises InputError for a device that does not exist or cannot be used.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # an assertion: a PyTorch that was built without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {quoted(name)} cannot be used ({reason}); expected auto, cpu, cuda or mps: use auto or cpu."
        ) from error
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. Copies to CUDA use pinned memory and are asynchronous.

    Copies to MPS stay synchronous: an asynchronous one may read its source after that is freed.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions; otherwise torch emulates them in float32, which is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("NO AVX", "DEFAULT", "AVX2")
