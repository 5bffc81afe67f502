"""Peak memory of each training mode.

    python -m benchmarks.memory [--scale tiny|full] [--device cpu|cuda] [--modes paper ...] [--out FILE.json]
    python -m benchmarks.memory --counted [--scale tiny|full] ...   memory of a GPU in bf16, counted without a GPU

Each mode runs a few iterations in its own process. With --counted, memory and operations are counted without computing
(benchmarks/counted.py). `benchmarks.full_architecture` measures the memory of loading.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from echodistill_core.errors import EchoDistillError
from echodistill_core.settings import TrainSettings, from_options

from .architecture_jobs import run_isolated
from .counted import count_iteration
from .measure import Figures, argument_parser, cost, device_name, memory_in_use, table
from .random_models import RandomModels
from .train_step import MODES, iteration, mode_settings


def measured_memory(scale: str, device: str, precision: str, mode: str) -> dict[str, Any]:
    """Job: bytes before the first iteration (weights, heads, backbones), and the peak over three iterations."""
    torch_device = torch.device(device)
    models = RandomModels(scale, torch_device)
    state = models.state(models.settings(precision=precision, **MODES[mode]))
    models.release_weights()
    weights = memory_in_use(torch_device)
    return {"weights": weights, "peak": cost(iteration(state, models), torch_device, 1, 3).peak}


def counted_memory(scale: str, mode: str, resolution: int) -> dict[str, Any]:
    """Bytes and operations of an iteration of this mode in bf16, counted. resolution: pixels; 0 takes the family's."""
    options = {"class_noun": "dog", "device": "cpu", "precision": "bf16", "resolution": resolution, **MODES[mode]}
    return asdict(count_iteration(from_options(TrainSettings, options), scale))


def counted_table(cells: Mapping[str, Any]) -> str:
    """A row for each mode: weights, the peak of each step, and operations."""
    steps = list(next(iter(cells.values()))["peak"])
    rows = [
        [
            mode,
            _gib(cell["weights"]),
            *(_gib(cell["peak"][step]) for step in steps),
            f"{sum(cell['flop'].values()) / 1e12:.4g}",
        ]
        for mode, cell in cells.items()
    ]
    return table(["GiB, counted", "weights", *(f"{step} step" for step in steps), "TFLOP"], rows)


def measured_table(cells: Mapping[str, Any]) -> str:
    """A row for each mode: memory before the first iteration, and the peak."""
    rows = [[mode, *(_gib(cell[key]) for key in ("weights", "peak"))] for mode, cell in cells.items()]
    return table(["GiB", "before the first iteration", "peak"], rows)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def main(arguments: Sequence[str] | None = None, *, isolated: bool = True) -> int:
    """Run the command. Returns the exit status. isolated: False measures in this process, for tests."""
    parser = argument_parser("benchmarks.memory", __doc__)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="training modes")
    parser.add_argument(
        "--resolution", type=int, default=0, help="with --counted: side in pixels; 0 takes the family's own"
    )
    parser.add_argument("--counted", action="store_true", help="count the memory of a GPU without computing")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    try:
        settings: dict[str, Any] = {"scale": options.scale, "precision": "bf16" if options.counted else precision}
        settings["modes"] = mode_settings()
        if options.counted:
            settings |= {"counted": True, "resolution": options.resolution}
        figures = Figures(options.out, "memory", device, settings)
        if options.counted:
            jobs = {mode: partial(counted_memory, options.scale, mode, options.resolution) for mode in options.modes}
            print(counted_table({mode: figures.cell(mode, job) for mode, job in jobs.items()}))
            return 0
        job = partial(run_isolated, isolated, measured_memory, options.scale, options.device, precision)
        cells = {mode: figures.cell(mode, partial(job, mode)) for mode in options.modes}
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {options.scale} scale, {precision}, {figures.record['date']}")
    print(measured_table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
