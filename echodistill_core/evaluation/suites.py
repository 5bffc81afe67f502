"""The bench's suites, the selection of parts of a suite, and the command that runs one and writes its report.

`SUITES` is a registry: docs/extending.md shows how to add a suite.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..errors import InputError, Notice
from ..files import write_json
from ..messages import quoted
from ..miniature.concepts import CONCEPTS, DEVELOPMENT, EVALUATION
from ..miniature.world import CONTEXTS
from ..models.embedded import FOLDER, MANIFEST, sha256
from ..models.sources import settings_for
from ..registry import Registry
from ..settings import EchoSettings, TrainSettings, affecting_result, nearest
from .bench import SOURCES, Suite, gather, read_json, run_cells, settings_of
from .methods import METHODS, TRAININGS, TRIALS
from .report import write_report

MINIATURE = Suite(tuple(c.name for c in EVALUATION), (0, 1, 2), tuple(TRAININGS))
# Settings are tuned on development concepts, never on those of the evaluation.
SWEEP = Suite(tuple(c.name for c in DEVELOPMENT), (0, 1, 2), tuple(TRIALS))
RECORD = "suite.json"  # the settings of a folder's cells, and the runs that measured them
SUITES: Registry[Suite] = Registry("suite", {"miniature": MINIATURE, "sweep": SWEEP})
ALIASES = {"laboratory": "sweep"}  # earlier names, which old commands use
# Runs every kind of training and every part of the report in about a minute; too short for meaningful figures.
QUICK = Suite(
    (EVALUATION[0].name,),
    (0,),
    ("echodistill", "custom-diffusion-teacher", "textual-inversion", "no-critics"),
    sampling_seeds=2,
    prompts=2,
    options={"iterations": 4},
    echo_options={"iterations": 2, "pool_size": 4},
)


def bench(folder: Path, suite: Suite, *, workers: int, command: str, log: Callable[[str], None]) -> tuple[Path, Path]:
    """Run the suite's cells that the folder lacks, and write the report; returns its files, report.md and report.html.

    workers: processes; 0 runs nothing and only writes the report and the contact sheets of the results so far.
    command: the command line, for the report. log: called with one line for each finished cell.
    The same call resumes an interrupted bench. Raises InputError where the folder holds results of other settings, or
    where workers is 0 and it holds no bench.
    """
    if not workers and not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no bench to report on (no {RECORD}); check --out, or run without --report.")
    _check_record(folder, suite)
    if workers:
        _record_run(folder, command, workers)
        rows = run_cells(folder, suite, workers, log)
    else:
        rows = gather(folder, suite)
    return write_report(rows, _header(folder, suite), folder)


def suite_named(name: str) -> Suite:
    """The suite of this name or earlier name. Raises InputError for an unknown name, suggesting the nearest."""
    if name in ALIASES:
        warnings.warn(f"the suite {name} is now called {ALIASES[name]}", category=Notice, stacklevel=2)
    name = ALIASES.get(name, name)
    if name not in SUITES:
        raise InputError(f"--suite is {quoted(name)}; expected one of {', '.join(SUITES)}{nearest(name, SUITES)}.")
    return SUITES[name]


def select(suite: Suite, *, trainings: Sequence[str], seeds: int, development: bool) -> Suite:
    """The suite reduced to some trainings (none given: all of its own) and seeds 0 to `seeds` - 1 (0: its own).

    development: replace its concepts by the development concepts. Raises InputError for an unknown training, suggesting
    the nearest.
    """
    for name in trainings:
        if name not in METHODS:
            raise InputError(
                f"there is no training {quoted(name)} in the bench; expected one of {', '.join(METHODS)}"
                f"{nearest(name, METHODS)}."
            )
    if development:
        suite = replace(suite, concepts=tuple(c.name for c in DEVELOPMENT))
    if seeds:
        suite = replace(suite, seeds=tuple(range(seeds)))
    return replace(suite, trainings=tuple(trainings) or suite.trainings)


def _check_record(folder: Path, suite: Suite) -> None:
    """Write the settings of this folder's cells to suite.json. Raises InputError where it has other ones already.

    It also raises InputError for a folder with other files and no suite.json. Concepts, seeds and trainings may be
    added: each has cells of its own.
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
            # A setting that was added after the folder was made reproduces the older behaviour by its default.
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
    """The settings that all runs of this training share, with those of the family, its preset and the suite."""
    whole = affecting_result(settings_of(suite, METHODS[training], CONCEPTS[suite.concepts[0]], 0))
    return {name: value for name, value in whole.items() if name not in ("seed", "class_noun")}


def _record_run(folder: Path, command: str, workers: int) -> None:
    """Add this command, date and machine to the runs in the folder's record."""
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
    """The head of the report: the last run, the earlier runs, and the suite's concepts, seeds and settings."""
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
