"""How much memory does each mode of training take at the most?

    python -m benchmarks.memory [--scale tiny|full] [--device cpu|cuda] [--modes paper ...] [--out FILE.json]

Each mode runs a few iterations in a process of its own. `benchmarks.full_architecture` tells what loading takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from echodistill_core.errors import EchoDistillError

from .architecture_jobs import run_alone
from .measure import Figures, cost, device_name, now, table
from .train_step import MODES, iteration
from .workbench import Workbench


def peak_of(scale: str, device: str, precision: str, mode: str) -> dict[str, Any]:
    """Job: bytes before the first iteration (weights, heads, backbones), and at the most over a few."""
    place = torch.device(device)
    bench = Workbench(scale, place)
    state = bench.state(bench.settings(precision=precision, **MODES[mode]))
    bench.checkpoints.clear()
    before = now(place)
    return {"weights": before, "peak": cost(iteration(state, bench), place, 1, 3).peak}


def main(arguments: Sequence[str] | None = None, *, isolated: bool = True) -> int:
    """The command. Returns the exit status. isolated: False measures in this process, for tests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    try:
        figures = Figures(given.out, "memory", device, {"scale": given.scale, "precision": precision})
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
