"""The bench: every training of the tables on every concept with every seed, resumable, several at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from ..adapter.apply import personalised
from ..adapter.file import read_adapter
from ..errors import DivergedError, InputError
from ..files import write_json
from ..miniature.concepts import CONCEPTS, Concept, photographs
from ..miniature.judges import Judges, load_judges
from ..models.family import Family
from ..models.open import open_family
from ..models.sources import ModelSources, settings_for
from ..reporting import contact_sheet, save_picture
from ..settings import EchoSettings, TrainSettings
from ..training import session
from ..training.events import Event
from ..training.run import Run
from ..training.start import start_files
from .methods import ALL, EvalSpec, Training
from .paper import REFERENCES, title_of
from .scoring import Samples, draw, real, score

SOURCES = ModelSources(family="miniature")
SHEET_PROMPTS = 4
RESULTS = "results.json"


@dataclass(frozen=True)
class Suite:
    """What is run.

    sampling_seeds, prompts: of each evaluation; prompts 0 takes all eight. options, echo_options: settings of every
    training and of every echo, over the family's own.
    """

    concepts: tuple[str, ...]
    seeds: tuple[int, ...]
    trainings: tuple[str, ...]
    sampling_seeds: int = 4
    prompts: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    echo_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One training on one concept with one seed."""

    training: str
    concept: str
    seed: int

    @property
    def name(self) -> str:
        """Its file's name, without ending."""
        return f"{self.training}-{self.concept}-{self.seed}"


def cells_of(suite: Suite) -> list[Cell]:
    """All cells, seeds outermost, so that an unfinished bench has whole tables of fewer seeds."""
    references = [Cell(name, c, suite.seeds[0]) for c in suite.concepts for name in REFERENCES]
    return references + [Cell(t, c, s) for s in suite.seeds for c in suite.concepts for t in suite.trainings]


def run_cells(folder: Path, suite: Suite, workers: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run what is not yet there, and return the results of the suite's cells (see `run_cell` and `gather`).

    workers: processes, each with one thread of computation. say: is given a line for every cell.
    Raises InputError where earlier results cannot be read.
    """
    there = _found(folder, suite)
    waiting = [cell for cell in cells_of(suite) if cell.name not in there]
    began, total = time.monotonic(), len(waiting)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker) as pool:
        jobs = {pool.submit(run_cell, folder, suite, cell): cell for cell in waiting}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                found = job.result()[0]["metrics"] or {}
                left = (time.monotonic() - began) / done * (total - done) / 60
                figures = "  ".join(f"{name} {value:.3f}" for name, value in found.items()) or "diverged"
                say(f"{done}/{total}  {jobs[job].name}  {figures}  {left:.0f} min left")
        except KeyboardInterrupt:
            # Leaving the block waits for every job that is not cancelled, which may be hours.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return gather(folder, suite)


def gather(folder: Path, suite: Suite) -> list[dict[str, Any]]:
    """The results of those of the suite's cells that are there; results.json is brought up to date with them.

    With suite.json it carries a bench to another machine. It keeps what other calls measured in this folder: other
    concepts, seeds and trainings. Raises InputError where results cannot be read.
    """
    results = _found(folder, suite)
    write_json(folder / RESULTS, [row for rows in (_earlier(folder) | results).values() for row in rows])
    return [row for rows in results.values() for row in rows]


def _found(folder: Path, suite: Suite) -> dict[str, list[dict[str, Any]]]:
    """The results of those of the suite's cells that have a file of their own, or stand in results.json, by name."""
    results = _earlier(folder)
    for cell in cells_of(suite):
        if (path := _result(folder, cell)).is_file():
            results[cell.name] = read_json(path, "remove it and run the bench again")
    return {cell.name: results[cell.name] for cell in cells_of(suite) if cell.name in results}


def _earlier(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results that results.json holds, by the name of their cell."""
    path = folder / RESULTS
    found: dict[str, list[dict[str, Any]]] = {}
    remedy = "restore it, or choose another --out"
    try:
        for row in read_json(path, remedy) if path.is_file() else []:
            found.setdefault(Cell(row["training"], row["concept"], row["seed"]).name, []).append(row)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results of a bench ({error!r} in a row); {remedy}.") from error
    return found


def run_cell(folder: Path, suite: Suite, cell: Cell) -> list[dict[str, Any]]:
    """Train one cell and evaluate its looks; the results are written to folder/cells/<cell>.json and returned.

    One result for each look: what evaluation.summary reads, with the metrics of `scoring.score`, or None for them where
    training diverged, and a contact sheet. An interrupted training goes on at its last checkpoint.
    """
    if cell.training in REFERENCES:
        rows = _run_reference(folder, suite, cell)
        write_json(_result(folder, cell), rows)
        return rows
    family, judges = _models()
    training, concept = ALL[cell.training], CONCEPTS[cell.concept]
    runs = folder / "runs" / cell.name
    began = time.monotonic()
    run: Run | None = None
    with contextlib.suppress(DivergedError):
        run = train(family, suite, training, concept, cell.seed, runs)
    seconds = time.monotonic() - began
    iterations = settings_of(suite, training, concept, cell.seed).iterations
    rows = []
    for look in training.looks:
        row = {**_row(cell, look, iterations), "diverged": run is None, "seconds": seconds}
        if run is not None:
            row["metrics"], row["picture"] = _evaluate(folder, suite, cell, look, family, judges, run)
        rows.append(row)
    write_json(_result(folder, cell), rows)
    shutil.rmtree(runs, ignore_errors=True)
    return rows


def _run_reference(folder: Path, suite: Suite, cell: Cell) -> list[dict[str, Any]]:
    """The rows that need no training: the student as it is, asked for the plain noun, and the concept itself."""
    family, judges = _models()
    concept = CONCEPTS[cell.concept]
    if cell.training == "photographs":
        made = real(concept, suite.sampling_seeds, suite.prompts)
    else:
        with personalised(family.to("cpu", torch.float32)) as model:
            made = draw(model, concept, "", seeds=suite.sampling_seeds, count=suite.prompts)
    row = _row(cell, EvalSpec(cell.training), 0)
    row["metrics"], row["picture"] = score(made, concept, "", judges), _sheet(folder, suite, cell, cell.training, made)
    return [row]


def _row(cell: Cell, look: EvalSpec, iterations: int) -> dict[str, Any]:
    return {
        "training": cell.training,
        "method": look.method,
        "title": title_of(look.method),
        "concept": cell.concept,
        "seed": cell.seed,
        "iterations": iterations,
        "role": look.role,
        "steps": look.steps,
        "diverged": False,
        "seconds": 0.0,
        "metrics": None,
        "picture": "",
    }


def settings_of(suite: Suite, training: Training, concept: Concept, seed: int) -> TrainSettings:
    """The settings of one run: the family's own, the suite's, the training's, in rising precedence."""
    options = {**suite.options, **training.options, "class_noun": concept.class_noun, "seed": seed, "device": "cpu"}
    return settings_for(TrainSettings, {"preview_every": 0, **options}, SOURCES)


def train(family: Family, suite: Suite, training: Training, concept: Concept, seed: int, folder: Path) -> Run:
    """The run of one cell: distilled, and echoed where the training asks for it."""
    pictures = photographs(concept)
    settings = settings_of(suite, training, concept, seed)
    start = {}
    if training.first:
        first = ALL[training.first]
        before = session.train(
            pictures, family, settings_of(suite, first, concept, seed), SOURCES, folder / "first", _silent
        )
        start = start_files([before.folder])
    run = session.train(pictures, family, settings, SOURCES, folder / "run", _silent, start)
    if training.echo:
        run = session.echo(run, family, settings_for(EchoSettings, suite.echo_options, SOURCES), _silent)
    return run


def _evaluate(
    folder: Path, suite: Suite, cell: Cell, look: EvalSpec, family: Family, judges: Judges, run: Run
) -> tuple[dict[str, float], str]:
    concept = CONCEPTS[cell.concept]
    adapter = read_adapter(run.path(look.stage, f"{look.role}.safetensors"))
    family.to("cpu", torch.float32)
    guidance = run.settings.guidance_scale if look.role == "teacher" else 1.0
    with personalised(family, [adapter], role=look.role) as model:
        made = draw(
            model,
            concept,
            adapter.placeholder,
            seeds=suite.sampling_seeds,
            steps=look.steps,
            guidance=guidance,
            count=suite.prompts,
        )
    return score(made, concept, adapter.placeholder, judges), _sheet(folder, suite, cell, look.method, made)


def _sheet(folder: Path, suite: Suite, cell: Cell, method: str, made: Samples) -> str:
    """The first sample of a few prompts as a picture in the bench's folder; returns its path in there.

    Of the first seed only, which is the one that a report shows; "" for the others.
    """
    if cell.seed != suite.seeds[0]:
        return ""
    picture = f"pictures/{method}-{cell.concept}.webp"
    save_picture(folder / picture, contact_sheet(made.images[:: made.seeds][:SHEET_PROMPTS]))
    return picture


@cache
def _models() -> tuple[Family, Judges]:
    """Family and judges of this process, loaded once."""
    return open_family(SOURCES), load_judges()


def _begin_worker() -> None:
    """One thread of computation; and a worker whose parent was killed ends too, instead of waiting for ever."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _silent(event: Event) -> None:
    """A listener that tells nothing: of many runs at once, only the results are told."""


def read_json(path: Path, remedy: str) -> Any:
    """What stands in a file of the bench's folder. Raises InputError, with the remedy, where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}.") from error


def _result(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"
