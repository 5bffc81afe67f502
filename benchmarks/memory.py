"""How much memory does each mode of training take at the most?

    python -m benchmarks.memory [--scale tiny|full] [--device cpu|cuda] [--modes paper ...] [--out FILE.json]
    python -m benchmarks.memory --counted [--scale tiny|full] ...   what a GPU is asked for in bf16; needs none

Each mode runs a few iterations in a process of its own, or is counted (benchmarks/counted) in one. What loading takes,
`benchmarks.full_architecture` tells.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from echodistill_core.errors import EchoDistillError
from echodistill_core.settings import TrainSettings, from_options

from .architecture_jobs import run_alone
from .counted import count
from .measure import Figures, cost, device_name, now, table
from .train_step import MODES, iteration, meaning
from .workbench import Workbench


def peak_of(scale: str, device: str, precision: str, mode: str) -> dict[str, Any]:
    """Job: bytes before the first iteration (weights, heads, backbones), and at the most over a few."""
    place = torch.device(device)
    bench = Workbench(scale, place)
    state = bench.state(bench.settings(precision=precision, **MODES[mode]))
    bench.forget()
    before = now(place)
    return {"weights": before, "peak": cost(iteration(state, bench), place, 1, 3).peak}


def counted(scale: str, mode: str, resolution: int) -> dict[str, Any]:
    """Job: an iteration of this mode in bf16, counted."""
    options = {"class_noun": "dog", "device": "cpu", "precision": "bf16", "resolution": resolution, **MODES[mode]}
    return asdict(count(from_options(TrainSettings, options), scale))


def counted_table(cells: Mapping[str, Any]) -> str:
    """Peaks by step and operations of every mode."""
    steps = list(next(iter(cells.values()))["peak"])
    rows = [
        [
            mode,
            f"{cell['weights'] / 2**30:.2f}",
            *(f"{cell['peak'][step] / 2**30:.2f}" for step in steps),
            f"{sum(cell['flop'].values()) / 1e12:.4g}",
        ]
        for mode, cell in cells.items()
    ]
    return table(["GiB, counted", "weights", *(f"step of {step}" for step in steps), "TFLOP"], rows)


def main(arguments: Sequence[str] | None = None, *, isolated: bool = True) -> int:
    """The command. Returns the exit status. isolated: False measures in this process, for tests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--resolution", type=int, default=0, help="pixels, with --counted; 0 takes the family's own")
    parser.add_argument("--counted", action="store_true", help="count what a GPU would be asked for, computing nothing")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    try:
        settings: dict[str, Any] = {"scale": given.scale, "precision": "bf16" if given.counted else precision}
        settings["modes"] = meaning()
        if given.counted:
            settings |= {"counted": True, "resolution": given.resolution}
        figures = Figures(given.out, "memory", device, settings)
        if given.counted:
            jobs = {mode: partial(counted, given.scale, mode, given.resolution) for mode in given.modes}
            print(counted_table({mode: figures.cell(mode, job) for mode, job in jobs.items()}))
            return 0
        for mode in given.modes:
            figures.cell(mode, partial(run_alone, isolated, peak_of, given.scale, given.device, precision, mode))
    except EchoDistillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{device_name(device)}, {given.scale} scale, {precision}, {figures.record['date']}")
    cells = [(mode, figures.record["cells"][mode]) for mode in given.modes]
    rows = [
        [mode, *("-" if cell[k] is None else f"{cell[k] / 2**30:.2f}" for k in ("weights", "peak"))]
        for mode, cell in cells
    ]
    print(table(["GiB", "before the first iteration", "at the most"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
