"""The bench's suites: which concepts, seeds and trainings, at full length and in a quick form."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..errors import InputError
from ..files import write_json
from ..messages import quoted
from ..miniature.concepts import CONCEPTS, DEVELOPMENT, EVALUATION
from ..miniature.world import CONTEXTS
from ..models.embedded import FOLDER, MANIFEST, sha256
from ..models.sources import settings_for
from ..settings import EchoSettings, TrainSettings, affecting_result, nearest
from .bench import SOURCES, Suite, gather, read_json, run_cells, settings_of
from .methods import ALL, TRAININGS, TRIALS
from .report import write_report

MINIATURE = Suite(tuple(c.name for c in EVALUATION), (0, 1, 2), tuple(TRAININGS))
# Where settings are chosen: never on the concepts that judge them.
LABORATORY = Suite(tuple(c.name for c in DEVELOPMENT), (0, 1, 2), tuple(TRIALS))
RECORD = "suite.json"  # what a folder's cells are made with, and which runs made them
SUITES = {"miniature": MINIATURE, "laboratory": LABORATORY}
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

    workers: processes; with 0 nothing is run, and the report tells what is there and what is missing.
    command: what was called, for the report. say: is given a line for every cell.
    An interrupted bench goes on by the same call. Raises InputError where the folder holds another suite's results, or
    none to report.
    """
    if not workers and not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no bench to report on (no {RECORD}); check --out, or run without --report.")
    _declare(folder, suite)
    if workers:
        _sign(folder, command, workers)
        rows = run_cells(folder, suite, workers, say)
    else:
        rows = gather(folder, suite)
    return write_report(rows, _header(folder, suite), folder)


def chosen(suite: Suite, *, trainings: Sequence[str], seeds: int, development: bool) -> Suite:
    """The suite with some trainings only (all where empty), so many seeds (0: its own), or on development concepts.

    Raises InputError for an unknown training, suggesting the nearest.
    """
    for name in trainings:
        if name not in ALL:
            raise InputError(
                f"there is no training {quoted(name)} in the bench; expected one of {', '.join(ALL)}"
                f"{nearest(name, ALL)}."
            )
    if development:
        suite = replace(suite, concepts=tuple(c.name for c in DEVELOPMENT))
    if seeds:
        suite = replace(suite, seeds=tuple(range(seeds)))
    return replace(suite, trainings=tuple(trainings) or suite.trainings)


def _declare(folder: Path, suite: Suite) -> None:
    """Write what this folder's cells are made with, or raise InputError where they are made with something else.

    A folder that has other files and no such record is refused too.

    Concepts, seeds and trainings may grow: their cells stand apart.
    """
    path = folder / RECORD
    if folder.is_dir() and not path.is_file() and (others := sorted(p.name for p in folder.iterdir())):
        raise InputError(
            f"{folder} is no folder of a bench: it has no suite.json, but {others[0]}; choose a new or empty --out, so "
            "that nothing in it is overwritten."
        )
    made_with: dict[str, Any] = {
        "sampling_seeds": suite.sampling_seeds,
        "prompts": suite.prompts,
        "weights": sha256(FOLDER / MANIFEST),
        "echo": affecting_result(settings_for(EchoSettings, suite.echo_options, SOURCES)),
        **{f"training {name}": _settings(suite, name) for name in suite.trainings},
    }
    found = read_json(path, "choose another --out") if path.is_file() else {}
    defaults = {**affecting_result(EchoSettings()), **affecting_result(TrainSettings())}
    for name, value in made_with.items():
        there = found.get(name, value)
        if isinstance(value, dict):
            # A setting that is newer than the folder does at its default what was done before.
            value = {k: v for k, v in value.items() if k in there or v != defaults[k]}
        if there != value:
            if isinstance(value, dict):
                differing = [k for k in {**there, **value} if there.get(k) != value.get(k)]
                there, value = ({k: d[k] for k in differing if k in d} for d in (there, value))
            raise InputError(
                f"{folder} holds results of another suite: {name} is {quoted(there)} there and {quoted(value)} now; "
                "choose another --out."
            )
    write_json(path, {**made_with, **found})


def _settings(suite: Suite, training: str) -> dict[str, Any]:
    """What every run of this training has in common, from the family, its preset, the suite and the training."""
    whole = affecting_result(settings_of(suite, ALL[training], CONCEPTS[suite.concepts[0]], 0))
    return {name: value for name, value in whole.items() if name not in ("seed", "class_noun")}


def _sign(folder: Path, command: str, workers: int) -> None:
    """Note in the folder's record that this command measures here today, on this machine."""
    processor = platform.processor() or platform.machine()
    run = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor}, {os.cpu_count()} cores, {workers} processes, on the CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    record = read_json(folder / RECORD, "choose another --out")
    runs = [earlier for earlier in record.get("runs", []) if earlier != run]
    write_json(folder / RECORD, {**record, "runs": [*runs, run]})


def _header(folder: Path, suite: Suite) -> dict[str, Any]:
    """What a report begins with: who measured last, who before, and what."""
    *before, last = read_json(folder / RECORD, "choose another --out").get("runs") or [{}]
    return {
        "title": "EchoDistill in the miniature",
        **last,
        "concepts": list(suite.concepts),
        "seeds": list(suite.seeds),
        "sampling": f"{suite.prompts or len(CONTEXTS)} prompts, {suite.sampling_seeds} noises each",
        "settings": suite.options or "the miniature's own",
        **({"measured before that": before} if before else {}),
    }
