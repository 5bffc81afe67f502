"""What grows with iterations, photographs, batch, resolution and adapters, and how?

    python -m benchmarks.scaling [--scale tiny|full] [--device cpu|cuda] [--axes batch ...] [--out FILE.json]

One axis is changed at a time, the others at the paper's values. With --out an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from echodistill_core.adapter.apply import personalised
from echodistill_core.errors import EchoDistillError
from echodistill_core.sampling import sample

from .measure import WARM_UP, Figures, cost, device_name, now, table, wait
from .train_step import iteration
from .workbench import Workbench

# Sides in pixels: those of the full scale, and an eighth of them for the tiny one.
SIDES = {"full": (256, 384, 512, 768), "tiny": (32, 48, 64, 96)}
ITERATIONS = (10, 100, 1000)
BATCHES = (1, 2, 4, 8)
PHOTOGRAPHS = (1, 3, 10, 100)
ADAPTERS = (1, 2, 4, 8)

Opened = Callable[[], Workbench]  # so that networks are made only for what is not measured yet


def of_iterations(opened: Opened, precision: str, count: int) -> dict[str, Any]:
    """Seconds an iteration of a run so long, and memory at its end in bytes: neither should grow with its length."""
    bench = opened()
    work = iteration(bench.state(bench.settings(precision=precision)), bench)
    for _ in range(WARM_UP):
        work()
    wait(bench.device)
    begun = time.perf_counter()
    for _ in range(count):
        work()
    memory = now(bench.device)  # waits for the device
    return {"seconds": (time.perf_counter() - begun) / count, "peak": memory}


def of_batch(opened: Opened, precision: str, count: int) -> Any:
    """One iteration with so many images."""
    bench = opened()
    return cost(iteration(bench.state(bench.settings(precision=precision, batch_size=count)), bench), bench.device)


def of_resolution(opened: Opened, precision: str, side: int) -> Any:
    """One iteration with images of this side."""
    bench = opened().of_images(side)
    return cost(iteration(bench.state(bench.settings(precision=precision)), bench), bench.device)


def of_photographs(opened: Opened, precision: str, count: int) -> Any:
    """One iteration on so many photographs."""
    bench = opened().of_images(photographs=count)
    return cost(iteration(bench.state(bench.settings(precision=precision)), bench), bench.device)


def of_adapters(opened: Opened, precision: str, count: int) -> Any:
    """Putting so many adapters on the student and sampling one picture with them."""
    bench = opened()
    device = bench.device
    adapter = bench.adapter()
    worn = [replace(adapter, metadata={**adapter.metadata, "placeholder": f"<new{i}>"}) for i in range(count)]
    family = bench.family().to(device, torch.float16 if device.type == "cuda" else torch.float32)

    def work() -> None:
        with personalised(family, worn) as model:
            sample(model, [f"photo of a <new{count - 1}> dog"])

    return cost(work, device)


AXES: dict[str, tuple[Callable[..., Any], Callable[[str], Sequence[int]]]] = {
    "iterations": (of_iterations, lambda scale: ITERATIONS),
    "photographs": (of_photographs, lambda scale: PHOTOGRAPHS),
    "batch": (of_batch, lambda scale: BATCHES),
    "resolution": (of_resolution, lambda scale: SIDES[scale]),
    "adapters": (of_adapters, lambda scale: ADAPTERS),
}


def report(figures: Figures, axes: Sequence[str], scale: str) -> str:
    """A row for each value of each axis: its cost, and how many times that of the first value."""
    rows = []
    for axis in axes:
        values = AXES[axis][1](scale)
        first = figures.record["cells"][f"{axis} {values[0]}"]
        for value in values:
            cell = figures.record["cells"][f"{axis} {value}"]
            peak = "-" if cell["peak"] is None else f"{cell['peak'] / 2**30:.2f}"
            growth = f"{cell['seconds'] / first['seconds']:.2f}"
            rows.append([axis, value, f"{cell['seconds'] * 1e3:.1f}", growth, peak])
    return table(["axis", "value", "ms", "of the first", "memory GiB"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    try:
        figures = Figures(given.out, "scaling", device, {"scale": given.scale, "precision": precision})
        bench = cache(lambda: Workbench(given.scale, device))
        for axis in given.axes:
            measured, values = AXES[axis]
            for value in values(given.scale):
                figures.cell(f"{axis} {value}", partial(measured, bench, precision, value))
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {given.scale} scale, {precision}, {figures.record['date']}")
    print(report(figures, given.axes, given.scale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
