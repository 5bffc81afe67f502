"""The bench: every training of a suite on every concept with every seed, resumable, in parallel processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
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
from ..files import write_json, write_text
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
from .methods import METHODS, EvalSpec, Training, method_title
from .paper import REFERENCES
from .scoring import Samples, reference_samples, sample_prompts, score
from .sheets import write_sheets

SOURCES = ModelSources(family="miniature")
PICTURED_PROMPTS = 4
RESULTS = "results.json"
CELLS = "cells"  # results and pictures of single cells, which results.json and pictures/ contain too


@dataclass(frozen=True)
class Suite:
    """What the bench runs.

    concepts: names in `miniature.concepts.CONCEPTS`. seeds: of training. trainings: names in `methods.METHODS`.
    sampling_seeds, prompts: samples per prompt and number of prompts of each evaluation; prompts 0 takes all eight.
    options, echo_options: settings of every training and of every echo, which override the family's.
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
        """Name of the cell's file, without suffix."""
        return f"{self.training}-{self.concept}-{self.seed}"


def cells_of(suite: Suite) -> list[Cell]:
    """All cells, with seeds as the outer loop, so that an interrupted bench has complete tables of fewer seeds."""
    references = [Cell(name, c, suite.seeds[0]) for c in suite.concepts for name in REFERENCES]
    return references + [Cell(t, c, s) for s in suite.seeds for c in suite.concepts for t in suite.trainings]


def run_cells(folder: Path, suite: Suite, workers: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the suite's cells that have no result yet, and return the results of all (see `run_cell` and `gather`).

    workers: processes, each with one compute thread. log: called with one line for each finished cell.
    Raises InputError where earlier results cannot be read.
    """
    finished = _found(folder, suite)
    waiting = [cell for cell in cells_of(suite) if cell.name not in finished]
    began, total = time.monotonic(), len(waiting)
    spawn, trainings = get_context("spawn"), dict(METHODS)
    with ProcessPoolExecutor(workers, spawn, initializer=_begin_worker, initargs=(trainings,)) as pool:
        jobs = {pool.submit(run_cell, folder, suite, cell): cell for cell in waiting}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                found = job.result()[0]["metrics"] or {}
                left = (time.monotonic() - began) / done * (total - done) / 60
                figures = "  ".join(f"{name} {value:.3f}" for name, value in found.items()) or "diverged"
                log(f"{done}/{total}  {jobs[job].name}  {figures}  {left:.0f} min left")
        except KeyboardInterrupt:
            # Leaving the block waits for every job that is not cancelled, which may take hours.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return gather(folder, suite)


def gather(folder: Path, suite: Suite) -> list[dict[str, Any]]:
    """The results of the suite's finished cells. Updates results.json and the contact sheets of its pictures.

    suite.json, results.json and pictures/ are enough to resume a bench on another machine. results.json keeps results
    of this folder that are not in the suite: other concepts, seeds and trainings. Raises InputError where results
    cannot be read.
    """
    every = _earlier(folder) | _found(folder, suite)
    rows = write_sheets([_rounded(row) for of_cell in every.values() for row in of_cell], folder)
    _write_results(folder, rows)
    order = {cell.name: i for i, cell in enumerate(cells_of(suite))}
    wanted = (row for row in rows if _cell_of(row).name in order)
    return sorted(wanted, key=lambda row: order[_cell_of(row).name])


def _write_results(folder: Path, rows: list[dict[str, Any]]) -> None:
    """results.json: a JSON list with one result a line, which keeps the file small and its changes readable."""
    write_text(folder / RESULTS, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """The result with as many decimals as a report needs, which shows three: six of metrics, two of seconds."""
    metrics = {name: round(v, 6) if isinstance(v, float) else v for name, v in (row["metrics"] or {}).items()}
    seconds = row["seconds"]
    return {
        **row,
        "seconds": round(seconds, 2) if isinstance(seconds, float) else seconds,
        "metrics": metrics or row["metrics"],
    }


def _found(folder: Path, suite: Suite) -> dict[str, list[dict[str, Any]]]:
    """The results of the suite's finished cells by cell name: from the cell's own file, otherwise from results.json."""
    results = _earlier(folder)
    for cell in cells_of(suite):
        if (path := _result(folder, cell)).is_file():
            results[cell.name] = read_json(path, "remove it and run the bench again")
    return {cell.name: results[cell.name] for cell in cells_of(suite) if cell.name in results}


def _earlier(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The results in results.json by cell name."""
    path = folder / RESULTS
    found: dict[str, list[dict[str, Any]]] = {}
    remedy = "restore it, or choose another --out"
    try:
        for row in read_json(path, remedy) if path.is_file() else []:
            found.setdefault(_cell_of(row).name, []).append(row)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results of a bench ({error!r} in a row); {remedy}.") from error
    return found


def _cell_of(row: Mapping[str, Any]) -> Cell:
    return Cell(row["training"], row["concept"], row["seed"])


def run_cell(folder: Path, suite: Suite, cell: Cell) -> list[dict[str, Any]]:
    """Train one cell and run its evaluations; writes the results to folder/cells/<cell>.json and returns them.

    One result for each EvalSpec, in the form that `summary.summarise` reads: metrics of `scoring.score`, or None where
    training diverged, and the path of a picture with samples. An interrupted training resumes from its last checkpoint.
    """
    if cell.training in REFERENCES:
        rows = _run_reference(folder, suite, cell)
        write_json(_result(folder, cell), rows)
        return rows
    family, judges = _models()
    training, concept = METHODS[cell.training], CONCEPTS[cell.concept]
    runs = folder / "runs" / cell.name
    began = time.monotonic()
    run: Run | None = None
    with contextlib.suppress(DivergedError):
        run = train(family, suite, training, concept, cell.seed, runs)
    seconds = time.monotonic() - began
    iterations = settings_of(suite, training, concept, cell.seed).iterations
    rows = []
    for spec in training.evaluations:
        row = {**_row(cell, spec, iterations), "diverged": run is None, "seconds": seconds}
        if run is not None:
            row["metrics"], row["picture"] = _evaluate(folder, suite, cell, spec, family, judges, run)
        rows.append(row)
    write_json(_result(folder, cell), rows)
    shutil.rmtree(runs, ignore_errors=True)
    return rows


def _run_reference(folder: Path, suite: Suite, cell: Cell) -> list[dict[str, Any]]:
    """The rows that need no training: samples of the base student for the plain class noun, and real photographs."""
    family, judges = _models()
    concept = CONCEPTS[cell.concept]
    if cell.training == "photographs":
        samples = reference_samples(concept, suite.sampling_seeds, suite.prompts)
    else:
        with personalised(family.to("cpu", torch.float32)) as model:
            samples = sample_prompts(model, concept, "", seeds=suite.sampling_seeds, count=suite.prompts)
    row = _row(cell, EvalSpec(cell.training), 0)
    row["metrics"], row["picture"] = (
        score(samples, concept, "", judges),
        _picture(folder, suite, cell, cell.training, samples),
    )
    return [row]


def _row(cell: Cell, spec: EvalSpec, iterations: int) -> dict[str, Any]:
    return {
        "training": cell.training,
        "method": spec.method,
        "title": method_title(spec.method),
        "concept": cell.concept,
        "seed": cell.seed,
        "iterations": iterations,
        "role": spec.role,
        "steps": spec.steps,
        "diverged": False,
        "seconds": 0.0,
        "metrics": None,
        "picture": "",
    }


def settings_of(suite: Suite, training: Training, concept: Concept, seed: int) -> TrainSettings:
    """The settings of one run, in rising precedence: the family's, the suite's, the training's."""
    options = {**suite.options, **training.options, "class_noun": concept.class_noun, "seed": seed, "device": "cpu"}
    return settings_for(TrainSettings, {"preview_every": 0, **options}, SOURCES)


def train(family: Family, suite: Suite, training: Training, concept: Concept, seed: int, folder: Path) -> Run:
    """Run the stages of one cell: the training that it starts from, distillation and echo, as its Training says."""
    pictures = photographs(concept)
    settings = settings_of(suite, training, concept, seed)
    start = {}
    if training.first:
        first = METHODS[training.first]
        before = session.train(
            pictures, family, settings_of(suite, first, concept, seed), SOURCES, folder / "first", _silent
        )
        start = start_files([before.folder])
    run = session.train(pictures, family, settings, SOURCES, folder / "run", _silent, start)
    if training.echo:
        run = session.echo(run, family, settings_for(EchoSettings, suite.echo_options, SOURCES), _silent)
    return run


def _evaluate(
    folder: Path, suite: Suite, cell: Cell, spec: EvalSpec, family: Family, judges: Judges, run: Run
) -> tuple[dict[str, float], str]:
    concept = CONCEPTS[cell.concept]
    adapter = read_adapter(run.path(spec.stage, f"{spec.role}.safetensors"))
    family.to("cpu", torch.float32)
    guidance = run.settings.guidance_scale if spec.role == "teacher" else 1.0
    with personalised(family, [adapter], role=spec.role) as model:
        samples = sample_prompts(
            model,
            concept,
            adapter.placeholder,
            seeds=suite.sampling_seeds,
            steps=spec.steps,
            guidance=guidance,
            count=suite.prompts,
        )
    return score(samples, concept, adapter.placeholder, judges), _picture(folder, suite, cell, spec.method, samples)


def _picture(folder: Path, suite: Suite, cell: Cell, method: str, samples: Samples) -> str:
    """Write the first sample of a few prompts side by side, and return the file's path in the bench's folder.

    Only for the first training seed, which the report shows; "" for other seeds.
    """
    if cell.seed != suite.seeds[0]:
        return ""
    path = f"{CELLS}/{method}-{cell.concept}.webp"
    save_picture(folder / path, contact_sheet(samples.images[:: samples.seeds][:PICTURED_PROMPTS]))
    return path


@cache
def _models() -> tuple[Family, Judges]:
    """The family and the judges, loaded once in each process."""
    return open_family(SOURCES), load_judges()


def _begin_worker(trainings: Mapping[str, Training] | None = None) -> None:
    """Set up a worker process: one compute thread, the parent's registered trainings, and an end with the parent.

    Without the last, a worker whose parent was killed would wait for jobs for ever.
    """
    torch.set_num_threads(1)
    for name, training in (trainings or {}).items():
        if name in METHODS:
            METHODS.unregister(name)
        METHODS.register(name, training)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _silent(event: Event) -> None:
    """A listener that ignores all events: parallel runs report only their results."""


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file. Raises InputError, with the remedy in its message, where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); {remedy}.") from error


def _result(folder: Path, cell: Cell) -> Path:
    return folder / CELLS / f"{cell.name}.json"
