"""python -m echodistill_core.miniature.recipe --out DIR: train the embedded family."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...devices import pick_device
from .make import TINY, Amounts, make

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded family: data, VAE, encoders, teacher, student.")
    parser.add_argument("--out", required=True, type=Path, help="folder of the finished weights")
    parser.add_argument("--work", type=Path, default=Path("runs/recipe"), help="folder of data and checkpoints")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, to see that it runs")
    options = parser.parse_args()
    amounts = TINY if options.tiny else Amounts()
    for name, value in make(options.work, options.out, pick_device(options.device), amounts).items():
        print(f"{name:18} {value:.4f}")  # noqa: T201
