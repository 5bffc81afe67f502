"""Run all benchmarks and write the figures of each to a folder.

    python -m benchmarks [--scale tiny|full] [--device cpu|cuda] --out FOLDER

Figures that are already in the folder are not measured again, so an interrupted run continues.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from . import memory, sample, scaling, train_step
from .measure import argument_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if any benchmark failed; the others still run."""
    options = argument_parser("benchmarks", __doc__, out_required=True).parse_args(arguments)
    common = ["--scale", options.scale, "--device", options.device]
    status = 0
    for benchmark in (train_step, sample, memory, scaling):
        name = benchmark.__name__.rpartition(".")[2]
        print(f"\n{name}\n{'=' * len(name)}", flush=True)
        try:
            status |= benchmark.main([*common, "--out", str(options.out / f"{name}.json")])
        except Exception:  # usually out of memory; the other benchmarks may still fit
            traceback.print_exc()
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
