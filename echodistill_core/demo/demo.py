"""The demo: an ordinary run, with samples before and after each stage, and its page."""

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
# Overrides of the training defaults: no previews, since the page has samples, and frequent checkpoints for resuming.
RUN_SETTINGS: dict[str, Any] = {"preview_every": 0, "checkpoint_every": 50}

Log = Callable[[str], None]


@dataclass
class _Record:
    """A demo's timings, stored in its folder for the page of a later call.

    seconds: stage -> duration, summed over interrupted calls. machine: the hardware that trained.
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
            # The loss is small: timings alone.
            return cls(folder)

    @contextmanager
    def timing(self, stage: str, machine: str) -> Iterator[None]:
        """Add the block's duration to the stage's seconds, also when the block raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
            self.machine = machine
            # Training requires an empty folder, so nothing is written before it has begun.
            if (self.folder / "run.json").is_file():
                write_json(self.folder / RECORD, {"seconds": self.seconds, "machine": self.machine})


def learn(task: DemoTask, settings: DemoSettings, folder: Path, listen: Listener, log: Log) -> Path:
    """Train on the task in `folder`, or resume, and write the page; returns the page's path.

    A finished run is not trained again. listen: receives the events of both stages, as in `session.train`. log: called
    with one line at the start of every phase. Raises InputError, before any computation, for inputs that do not fit or
    a folder that holds something else (`check_folder`).
    """
    device = pick_device(settings.device)
    check_folder(folder, task, settings)
    train_settings, echo_settings = stage_settings(task, settings)
    placeholder = train_settings.placeholder
    prompts, plain = task.prompts(placeholder), task.prompts()

    began = time.monotonic()
    log(f"1/5 loading the {settings.family} family")
    sources = ModelSources(family=settings.family)
    family = open_family(sources)
    for warning in family.warnings:
        log(f"warning: {warning}")
    judges = load_judges() if settings.family == "miniature" else None
    seconds: dict[str, float | None] = {"open": time.monotonic() - began}

    log(f"2/5 {len(plain)} pictures before training, one step each")
    sampler = _Sampler(family, device, settings.seed, train_settings.guidance_scale)
    before, seconds["before"] = sampler.sample(plain)

    record = _Record.read(folder)
    where = machine(device)
    log(f"3/5 distilling {task.title}: {_state(folder, 'distil', settings.iterations)}")
    with nullcontext() if _is_finished(folder, "distil") else record.timing("distil", where):
        run = session.train(task.photographs, family, train_settings, sources, folder, listen)
    log(f"4/5 the echo: {_state(folder, 'echo', settings.echo_iterations)}")
    with nullcontext() if run.is_finished("echo") else record.timing("echo", where):
        run = session.echo(run, family, echo_settings, listen)

    log("5/5 the same pictures after training, and the page")
    distilled, seconds["after"] = sampler.sample(prompts, run, "distil")
    echoed, seconds["one_step"] = sampler.sample(prompts, run, "echo")
    teacher, seconds["teacher"] = sampler.sample(prompts, run, "distil", role="teacher")
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
    """The settings of both stages: the family's defaults, overridden by RUN_SETTINGS and the demo's settings."""
    sources = ModelSources(family=settings.family)
    own = {"iterations": settings.iterations, "seed": settings.seed, "device": settings.device}
    return (
        settings_for(TrainSettings, {**RUN_SETTINGS, **own, "class_noun": task.class_noun}, sources),
        settings_for(EchoSettings, {"iterations": settings.echo_iterations}, sources),
    )


def check_folder(folder: Path, task: DemoTask, settings: DemoSettings) -> None:
    """Raise InputError where the folder is a file or holds anything but a run of these settings."""
    session.check_folder(folder, task.photographs, *stage_settings(task, settings))


def machine(device: torch.device) -> str:
    """The hardware and software of a device, in a few words."""
    software = f"PyTorch {torch.__version__}, {platform.system()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {software}"
    threads = torch.get_num_threads()
    name = f"{platform.machine()}, {os.cpu_count()} CPU cores ({threads} thread{'s' if threads > 1 else ''} in use)"
    return f"{name}, {software}" if device.type == "cpu" else f"{device.type} on {name}, {software}"


@dataclass(frozen=True)
class _Sampler:
    """Samples prompts from the same noise with different models."""

    family: Family
    device: torch.device
    seed: int
    guidance: float

    def sample(
        self, prompts: Sequence[str], run: Run | None = None, stage: str = "", role: str = "student"
    ) -> tuple[Tensor, float]:
        """Images (B, 3, S, S) in [-1, 1] on the CPU and the seconds of sampling; without a run by the base model."""
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
