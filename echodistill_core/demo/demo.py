"""A demo from its settings to its page: an ordinary run folder, with samples before, between and after its stages."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.apply import personalised
from ..adapter.file import read_adapter
from ..concept.augment import to_unit
from ..devices import pick_device
from ..files import write_json, write_text
from ..miniature.judges import load_judges
from ..models.family import Family
from ..models.open import open_family
from ..models.sources import ModelSources, settings_for
from ..sampling import TEACHER_STEPS, sample
from ..settings import EchoSettings, TrainSettings
from ..training import session
from ..training.events import Listener
from ..training.run import Run, open_run
from .page import Column, Page, render
from .scores import score
from .settings import DemoSettings
from .task import DemoTask

PAGE = "index.html"
RECORD = "demo.json"
# What every demo changes in the defaults of training: its page shows the pictures, and a killed one resumes near.
RUN_SETTINGS: dict[str, Any] = {"preview_every": 0, "checkpoint_every": 50}

Tell = Callable[[str], None]


@dataclass
class _Record:
    """What a demo has measured of itself in its folder, so that the page of a later call can tell it too.

    seconds: stage -> what it took, over all calls that it took. machine: where it trained.
    """

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    machine: str = ""

    @classmethod
    def read(cls, folder: Path) -> _Record:
        """The folder's record; an empty one where there is none or it cannot be read."""
        try:
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            return cls(folder, {str(k): float(v) for k, v in found["seconds"].items()}, str(found["machine"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Only times are lost.
            return cls(folder)

    @contextmanager
    def timing(self, stage: str, machine: str) -> Iterator[None]:
        """Add what the block takes to the stage's seconds, however it ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
            self.machine = machine
            # Before that, training has not begun, and its folder must be empty then.
            if (self.folder / "run.json").is_file():
                write_json(self.folder / RECORD, {"seconds": self.seconds, "machine": self.machine})


def learn(task: DemoTask, settings: DemoSettings, folder: Path, listen: Listener, tell: Tell) -> Path:
    """Learn the task in `folder` and write its page there: begun, resumed, or found finished and shown again.

    listen: hears both stages, as `session.train` calls it. tell: is given a line at the beginning of every phase.
    Returns the page's path. Raises InputError before anything is computed where an input does not fit or the folder
    holds something else (`check_folder`).
    """
    device = pick_device(settings.device)
    check_folder(folder, task, settings)
    train_settings, echo_settings = stage_settings(task, settings)
    placeholder = train_settings.placeholder
    prompts, plain = task.prompts(placeholder), task.prompts()

    began = time.monotonic()
    tell(f"1/5 opening the {settings.family} family")
    sources = ModelSources(family=settings.family)
    family = open_family(sources)
    for warning in family.warnings:
        tell(f"warning: {warning}")
    judges = load_judges() if settings.family == "miniature" else None
    seconds: dict[str, float | None] = {"open": time.monotonic() - began}

    tell(f"2/5 {len(plain)} pictures before training, in one step each")
    artist = _Artist(family, device, settings.seed, train_settings.guidance_scale)
    before, seconds["before"] = artist.draw(plain)

    record = _Record.read(folder)
    where = machine(device)
    tell(f"3/5 distilling {task.title}: {_state(folder, 'distil', settings.iterations)}")
    with nullcontext() if _is_finished(folder, "distil") else record.timing("distil", where):
        run = session.train(task.photographs, family, train_settings, sources, folder, listen)
    tell(f"4/5 the echo: {_state(folder, 'echo', settings.echo_iterations)}")
    with nullcontext() if run.is_finished("echo") else record.timing("echo", where):
        run = session.echo(run, family, echo_settings, listen)

    tell("5/5 the same pictures after training, and the page")
    distilled, seconds["after"] = artist.draw(prompts, run, "distil")
    echoed, seconds["one_step"] = artist.draw(prompts, run, "echo")
    teacher, seconds["teacher"] = artist.draw(prompts, run, "distil", role="teacher")
    references = to_unit(run.photographs().pixels)
    began = time.monotonic()

    def column(title: str, note: str, images: Tensor) -> Column:
        return Column(title, note, images, score(judges, task, images, plain, references) if judges else {})

    page = Page(
        task=task,
        placeholder=placeholder,
        family=settings.family,
        folder=folder,
        photographs=references,
        columns=(
            column("before", "1 step", before),
            column("distilled", "1 step", distilled),
            column("after echo", "1 step", echoed),
            column("teacher", f"{TEACHER_STEPS} steps", teacher),
        ),
        losses={stage: run.read_log(stage) for stage in ("distil", "echo")},
        iterations={"distil": settings.iterations, "echo": settings.echo_iterations},
        seconds={
            **seconds,
            "distil": record.seconds.get("distil"),
            "echo": record.seconds.get("echo"),
            "scores": time.monotonic() - began,
        },
        machine=record.machine or where,
    )
    write_text(folder / PAGE, render(page))
    return folder / PAGE


def stage_settings(task: DemoTask, settings: DemoSettings) -> tuple[TrainSettings, EchoSettings]:
    """The settings of both stages: the family's own, but for what every demo changes and what was asked."""
    sources = ModelSources(family=settings.family)
    asked = {"iterations": settings.iterations, "seed": settings.seed, "device": settings.device}
    return (
        settings_for(TrainSettings, {**RUN_SETTINGS, **asked, "class_noun": task.class_noun}, sources),
        settings_for(EchoSettings, {"iterations": settings.echo_iterations}, sources),
    )


def check_folder(folder: Path, task: DemoTask, settings: DemoSettings) -> None:
    """Raise InputError where the folder is a file, or holds the run of another demo or anything else."""
    session.check_folder(folder, task.photographs, *stage_settings(task, settings))


def machine(device: torch.device) -> str:
    """What computes, in a few words."""
    software = f"PyTorch {torch.__version__}, {platform.system()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {software}"
    threads = torch.get_num_threads()
    name = f"{platform.machine()}, {os.cpu_count()} CPU cores ({threads} thread{'s' if threads > 1 else ''} in use)"
    return f"{name}, {software}" if device.type == "cpu" else f"{device.type} on {name}, {software}"


@dataclass(frozen=True)
class _Artist:
    """Draws the prompts, always from the same noise."""

    family: Family
    device: torch.device
    seed: int
    guidance: float

    def draw(
        self, prompts: Sequence[str], run: Run | None = None, stage: str = "", role: str = "student"
    ) -> tuple[Tensor, float]:
        """Images (B, 3, S, S) in [-1, 1] on the CPU, and the seconds they took; without a run from the bare family."""
        teacher = role == "teacher"
        adapters = [] if run is None else [read_adapter(run.path(stage, f"{role}.safetensors"))]
        try:
            self.family.to(self.device, torch.float32)
            with personalised(self.family, adapters, role=role) as model:
                began = time.monotonic()
                images = sample(
                    model,
                    prompts,
                    seed=self.seed,
                    steps=TEACHER_STEPS if teacher else 1,
                    guidance=self.guidance if teacher else 1.0,
                ).cpu()
                return images, time.monotonic() - began
        finally:
            self.family.restore()


def _is_finished(folder: Path, stage: str) -> bool:
    return (folder / "run.json").is_file() and open_run(folder).is_finished(stage)


def _state(folder: Path, stage: str, iterations: int) -> str:
    if _is_finished(folder, stage):
        return "found finished"
    begun = (folder / stage / "checkpoint.safetensors").is_file()
    return f"{iterations} iterations" + (", going on from the last checkpoint" if begun else "")
