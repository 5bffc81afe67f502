"""Time, memory and arithmetic of a piece of work, and a JSON file of figures that a later run goes on with."""

from __future__ import annotations

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
# What a GPU's clock and a CPU's caches need before figures repeat.
WARM_UP, REPEATS = 3, 7
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """seconds: the median of the repeats. fastest, slowest: of them. peak: bytes at the most while it ran, the memory
    that was there before included (a GPU's allocator, or resident memory); None where the system does not tell.
    flop: floating-point operations counted by torch, 2 for a multiplication with its addition; 0 for what it does not
    count, as sorting.
    """

    seconds: float
    fastest: float
    slowest: float
    peak: int | None
    flop: int

    def each(self, count: int) -> Cost:
        """Of one of `count` equal pieces that were measured together."""
        times = (self.seconds / count, self.fastest / count, self.slowest / count)
        return Cost(*times, self.peak, self.flop // count)


def cost(work: Work, device: torch.device, warm_up: int = WARM_UP, repeats: int = REPEATS) -> Cost:
    """Measure a piece of work that can be repeated. It is counted in the warm-up; without one, its flop is 0."""
    flop = 0
    if warm_up:
        with counting() as counter:
            work()
        flop = counter.get_total_flops()
    for _ in range(warm_up - 1):
        work()
    _reset_peak(device)
    times = []
    for _ in range(repeats):
        wait(device)
        begun = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begun)
    return Cost(statistics.median(times), min(times), max(times), _peak(device), flop)


def counting() -> FlopCounterMode:
    """A counter of floating-point operations, the CPU's kernel for attention included, which torch's leaves out."""
    aten = torch.ops.aten
    own = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    }
    return FlopCounterMode(display=False, custom_mapping=own)


def matrix_ceiling(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """Floating-point operations a second of a square matrix product, the most that this device does in this precision.

    side: of the matrices; 0 takes 8192 on a GPU and 1024 on a CPU.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / cost(lambda: a @ b, device, repeats=20).fastest


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> int | None:
    """Bytes in use at present: a GPU's allocator, or resident memory; None where the system does not tell."""
    wait(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else memory().now


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(describe()["cpu"])


class Figures:
    """A JSON file of measured cells with machine, versions and settings.

    A cell that is in the file is not measured again, so an interrupted run goes on where it stopped.
    Raises InputError for a file of another benchmark, device or other settings.
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
            found = json.loads(path.read_text(encoding="utf-8"))
            for key, value in identity.items():
                if found.get(key) != value:
                    raise InputError(
                        f"{path} holds figures of {key} {found.get(key)!r}; expected {value!r}: give another --out, or "
                        "delete it."
                    )
            self.record = found

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """The cell's figures: those of the file, or measured now and kept. A Cost is kept as a dictionary."""
        if name not in self.record["cells"]:
            found = measure()
            self.record["cells"][name] = asdict(found) if isinstance(found, Cost) else found
            if self.path is not None:
                write_json(self.path, self.record)
        return self.record["cells"][name]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need, the first to the left and the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    drawn = []
    for first, *others in lines:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        drawn.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join([drawn[0], "-" * len(drawn[0]), *drawn[1:]])


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flop(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")  # the most resident memory counts from now on


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory().peak
