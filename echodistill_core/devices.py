"""Devices: by name, what they compute in, and which share the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError
from .messages import quoted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ONE_MEMORY = ("cpu", "mps")  # kinds whose memory is the host's, so that nothing is saved by moving weights there


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" prefers CUDA (ROCm goes by that name too), then Apple's MPS.

    Raises InputError where it is not there.
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
            f"device {quoted(name)} cannot be used ({reason}); expected auto, cpu, cuda or mps."
        ) from error
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. To a GPU it goes through page-locked memory, so that the host need not wait.

    Only there: on MPS, a copy that nobody waits for may read its source after that is gone.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it takes the way through float32, and longer."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("NO AVX", "DEFAULT", "AVX2")
