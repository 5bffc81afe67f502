"""Time, memory and floating-point operations of a function; resumable JSON files of figures; tables; arguments."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from echodistill_core.errors import InputError
from echodistill_core.files import write_json

from .machine import describe, memory

Work = Callable[[], object]
# A GPU's clock and a CPU's caches settle during the warm-up.
WARM_UP, REPEATS = 3, 7
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """The cost of one call.

    seconds: the median of the repeats. fastest, slowest: their range in seconds.
    peak: highest bytes in use during the repeats, earlier allocations included: of the CUDA allocator, or resident
        memory; None where the system does not report it.
    flop: floating-point operations counted by torch. A multiply-add counts 2; sorting and other operations without a
        formula count 0.
    """

    seconds: float
    fastest: float
    slowest: float
    peak: int | None
    flop: int

    def per_iteration(self, count: int) -> Cost:
        """The cost of one of `count` iterations that were measured in one call."""
        times = (self.seconds / count, self.fastest / count, self.slowest / count)
        return Cost(*times, self.peak, self.flop // count)


def cost(work: Work, device: torch.device, warm_up: int = WARM_UP, repeats: int = REPEATS) -> Cost:
    """Measure a repeatable function. Operations are counted in the first warm-up call; without one, flop is 0."""
    flop = 0
    if warm_up:
        with flop_counter() as counter:
            work()
        flop = counter.get_total_flops()
    for _ in range(warm_up - 1):
        work()
    _reset_peak(device)
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return Cost(statistics.median(times), min(times), max(times), _peak(device), flop)


def flop_counter() -> FlopCounterMode:
    """torch's counter of floating-point operations, extended to the CPU's fused attention."""
    aten = torch.ops.aten
    cpu_attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    }
    return FlopCounterMode(display=False, custom_mapping=cpu_attention)


def matmul_throughput(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """Operations per second of a square matrix product: the practical peak of this device in this precision.

    side: rows and columns of the matrices; 0 takes 8192 on a GPU and 1024 on a CPU.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / cost(lambda: a @ b, device, repeats=20).fastest


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work in its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int | None:
    """Current bytes of the CUDA allocator, or of resident memory; None where the system does not report it."""
    synchronize(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else memory().now


def device_name(device: torch.device) -> str:
    """The model name of the GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(describe()["cpu"])


class Figures:
    """A JSON file of measured cells, with the machine, library versions and settings.

    Cells that are in the file are not measured again, so an interrupted run continues.
    Raises InputError for a file of another benchmark, another device or other settings.
    """

    def __init__(self, path: Path | None, benchmark: str, device: torch.device, settings: dict[str, Any]) -> None:
        self.path = path
        identity = {"benchmark": benchmark, "device": device_name(device), "settings": settings}
        self.record: dict[str, Any] = {
            **identity,
            "date": date.today().isoformat(),
            "machine": describe(),
            "cells": {},
        }
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            for key, value in identity.items():
                if stored.get(key) != value:
                    raise InputError(
                        f"{path} holds figures of {key} {stored.get(key)!r}; expected {value!r}: give another --out, "
                        "or delete the file."
                    )
            self.record = stored

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a cell from the file, or measure and store it. A Cost is stored as a dictionary."""
        if name not in self.record["cells"]:
            value = measure()
            self.record["cells"][name] = asdict(value) if isinstance(value, Cost) else value
            if self.path is not None:
                write_json(self.path, self.record)
        return self.record["cells"][name]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A text table: each column as wide as its widest cell, the first left-aligned, the others right-aligned."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = []
    for first, *others in lines:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def argument_parser(command: str, description: str | None, *, out_required: bool = False) -> argparse.ArgumentParser:
    """A parser with the options of every measuring benchmark: --scale, --device and --out.

    command: the module that `python -m` runs. description: its docstring; the help shows the first line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=(description or "").split("\n")[0])
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny", help="size of the random models")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    figures = "folder of the figures" if out_required else "JSON file of the figures; existing cells are kept"
    parser.add_argument("--out", type=Path, required=out_required, help=figures)
    return parser


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5", encoding="ascii")  # resets VmHWM, the peak of resident memory, to the current value


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory().peak
