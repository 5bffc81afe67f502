"""Time and memory against the number of iterations, photographs, images in a batch, pixels and adapters.

    python -m benchmarks.scaling [--scale tiny|full] [--device cpu|cuda] [--axes batch ...] [--out FILE.json]

One axis varies at a time; the others have the paper's values. With --out an interrupted run continues.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from echodistill_core.adapter.apply import personalised
from echodistill_core.errors import EchoDistillError
from echodistill_core.sampling import sample

from .measure import WARM_UP, Cost, Figures, argument_parser, cost, device_name, memory_in_use, synchronize, table
from .random_models import RandomModels
from .train_step import iteration

# Image sides in pixels. The tiny family has an eighth of the full resolution.
SIDES = {"full": (256, 384, 512, 768), "tiny": (32, 48, 64, 96)}
ITERATIONS = (10, 100, 1000)
BATCHES = (1, 2, 4, 8)
PHOTOGRAPHS = (1, 3, 10, 100)
ADAPTERS = (1, 2, 4, 8)

GetModels = Callable[[], RandomModels]  # a cached call, so that nothing is built when all cells are in the file


def iterations_cost(get_models: GetModels, precision: str, count: int) -> dict[str, Any]:
    """Seconds per iteration of a run of `count` iterations, and bytes in use at its end. Neither should grow."""
    models = get_models()
    work = iteration(models.state(models.settings(precision=precision)), models)
    for _ in range(WARM_UP):
        work()
    synchronize(models.device)
    started = time.perf_counter()
    for _ in range(count):
        work()
    memory = memory_in_use(models.device)  # synchronises the device
    return {"seconds": (time.perf_counter() - started) / count, "peak": memory}


def _iteration_cost(models: RandomModels, **options: Any) -> Cost:
    return cost(iteration(models.state(models.settings(**options)), models), models.device)


def batch_cost(get_models: GetModels, precision: str, count: int) -> Cost:
    """The cost of an iteration with `count` images."""
    return _iteration_cost(get_models(), precision=precision, batch_size=count)


def resolution_cost(get_models: GetModels, precision: str, side: int) -> Cost:
    """The cost of an iteration with images of `side` pixels."""
    return _iteration_cost(get_models().with_images(side), precision=precision)


def photographs_cost(get_models: GetModels, precision: str, count: int) -> Cost:
    """The cost of an iteration with `count` photographs to choose from."""
    return _iteration_cost(get_models().with_images(photographs=count), precision=precision)


def adapters_cost(get_models: GetModels, precision: str, count: int) -> Cost:
    """The cost of applying `count` adapters to the student and sampling one image."""
    models = get_models()
    device = models.device
    adapter = models.adapter()
    adapters = [replace(adapter, metadata={**adapter.metadata, "placeholder": f"<new{i}>"}) for i in range(count)]
    family = models.family().to(device, torch.float16 if device.type == "cuda" else torch.float32)

    def work() -> None:
        with personalised(family, adapters) as model:
            sample(model, [f"photo of a <new{count - 1}> dog"])

    return cost(work, device)


# Each axis: how to measure one value, and the values at a scale.
AXES: dict[str, tuple[Callable[..., Any], Callable[[str], Sequence[int]]]] = {
    "iterations": (iterations_cost, lambda scale: ITERATIONS),
    "photographs": (photographs_cost, lambda scale: PHOTOGRAPHS),
    "batch": (batch_cost, lambda scale: BATCHES),
    "resolution": (resolution_cost, lambda scale: SIDES[scale]),
    "adapters": (adapters_cost, lambda scale: ADAPTERS),
}


def report(figures: Figures, axes: Sequence[str], scale: str) -> str:
    """A row for each value of each axis: its time, the ratio to the first value's time, and its memory."""
    rows = []
    for axis in axes:
        values = AXES[axis][1](scale)
        first = figures.record["cells"][f"{axis} {values[0]}"]
        for value in values:
            cell = figures.record["cells"][f"{axis} {value}"]
            peak = "-" if cell["peak"] is None else f"{cell['peak'] / 2**30:.2f}"
            ratio = f"{cell['seconds'] / first['seconds']:.2f}"
            rows.append([axis, value, f"{cell['seconds'] * 1e3:.1f}", ratio, peak])
    return table(["axis", "value", "ms", "ratio to first", "memory GiB"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argument_parser("benchmarks.scaling", __doc__)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="axes to measure")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    try:
        figures = Figures(options.out, "scaling", device, {"scale": options.scale, "precision": precision})
        get_models = cache(lambda: RandomModels(options.scale, device))
        for axis in options.axes:
            measure, values = AXES[axis]
            for value in values(options.scale):
                figures.cell(f"{axis} {value}", partial(measure, get_models, precision, value))
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {options.scale} scale, {precision}, {figures.record['date']}")
    print(report(figures, options.axes, options.scale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
