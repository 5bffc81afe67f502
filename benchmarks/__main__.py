"""Every benchmark, one after the other, each with its figures in a folder.

    python -m benchmarks [--scale tiny|full] [--device cpu|cuda] --out FOLDER

What is measured already is not measured again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from . import memory, sample, scaling, train_step


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 1 if any benchmark failed, after the others."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--scale", choices=["tiny", "full"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    common = ["--scale", given.scale, "--device", given.device]
    failed = 0
    for benchmark in (train_step, sample, memory, scaling):
        name = benchmark.__name__.rpartition(".")[2]
        print(f"\n{name}\n{'=' * len(name)}", flush=True)
        try:
            failed |= benchmark.main([*common, "--out", str(given.out / f"{name}.json")])
        except Exception:  # out of memory, above all: what the others measure is worth having
            traceback.print_exc()
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
