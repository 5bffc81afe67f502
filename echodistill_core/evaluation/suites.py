"""The bench's suites: which concepts, seeds and trainings, at full length and in a quick form."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..errors import InputError
from ..files import write_json
from ..miniature.concepts import DEVELOPMENT, EVALUATION
from ..miniature.world import CONTEXTS
from ..models.embedded import FOLDER, MANIFEST, sha256
from ..models.sources import FAMILIES
from ..settings import PRESETS, nearest
from .bench import SOURCES, Suite, read_json, run_cells
from .methods import BEST, TRAININGS
from .report import write_report

MINIATURE = Suite(tuple(c.name for c in EVALUATION), (0, 1, 2), tuple(TRAININGS))
# Shows that every kind of training and every part of the report works; its figures mean nothing.
QUICK = Suite(
    (EVALUATION[0].name,),
    (0,),
    ("echodistill", "custom-diffusion-teacher", "textual-inversion", "no-critics"),
    sampling_seeds=2,
    prompts=2,
    options={"iterations": 4},
    echo_options={"iterations": 2, "pool_size": 4},
)


def bench(folder: Path, suite: Suite, *, workers: int, command: str, say: Callable[[str], None]) -> tuple[Path, Path]:
    """Run a suite into a folder, or what is missing of it, and write its report; returns the report's files.

    command: what was called, for the report. say: is given a line for every cell.
    An interrupted bench goes on by the same call. Raises InputError where the folder holds another suite's results.
    """
    _declare(folder, suite)
    date = time.strftime("%Y-%m-%d")
    rows = run_cells(folder, suite, workers, say)
    write_json(folder / "results.json", rows)
    return write_report(rows, _header(suite, command, date, workers), folder)


def chosen(suite: Suite, *, trainings: Sequence[str], seeds: int, development: bool) -> Suite:
    """The suite with some trainings only (all where empty), so many seeds (0: its own), or on development concepts.

    Raises InputError for an unknown training, suggesting the nearest.
    """
    for name in trainings:
        if name not in TRAININGS:
            raise InputError(
                f"there is no training {name!r} in the bench; expected one of {', '.join(TRAININGS)}"
                f"{nearest(name, TRAININGS)}."
            )
    if development:
        suite = replace(suite, concepts=tuple(c.name for c in DEVELOPMENT))
    if seeds:
        suite = replace(suite, seeds=tuple(range(seeds)))
    return replace(suite, trainings=tuple(trainings) or suite.trainings)


def _declare(folder: Path, suite: Suite) -> None:
    """Write what this folder's cells are made with, or raise InputError where they are made with something else."""
    path = folder / "suite.json"
    # Concepts, seeds and trainings may grow: their cells stand apart. What every cell depends on may not change.
    shared = {k: v for k, v in asdict(suite).items() if k not in ("concepts", "seeds", "trainings")}
    # Nor may what stands outside the suite: cells of other weights or recommended settings do not compare.
    family = FAMILIES[SOURCES.family]
    shared |= {"weights": sha256(FOLDER / MANIFEST), "family": family.defaults, "family_echo": family.echo_defaults}
    shared |= {"tuned": PRESETS["tuned"], "best": BEST}
    if path.is_file():
        found = read_json(path, "choose another --out")
        differing = [k for k in shared if found.get(k) != shared[k]]
        if differing:
            raise InputError(
                f"{folder} holds results of another suite: {differing[0]} is {found.get(differing[0])!r} there and "
                f"{shared[differing[0]]!r} now; choose another --out."
            )
        return
    write_json(path, shared)


def _header(suite: Suite, command: str, date: str, workers: int) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    return {
        "title": "EchoDistill in the miniature",
        "command": command,
        "date": date,
        "machine": f"{processor}, {os.cpu_count()} cores, {workers} processes, on the CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "concepts": list(suite.concepts),
        "seeds": list(suite.seeds),
        "sampling": f"{suite.prompts or len(CONTEXTS)} prompts, {suite.sampling_seeds} noises each",
        "settings": suite.options or "the miniature's own",
    }
