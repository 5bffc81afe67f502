"""What the pack's own sockets carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...echodistill_core.concept.photographs import Photograph
from ...echodistill_core.training.run import Run

ConceptSocket = io.Custom("ECHO_CONCEPT")
RunSocket = io.Custom("ECHO_RUN")
AdapterSocket = io.Custom("ECHO_ADAPTER")


@dataclass(frozen=True)
class Concept:
    """The subject to learn: its photographs as they are, and how captions name it."""

    photographs: tuple[Photograph, ...]
    class_noun: str
    placeholder: str
    crop: str


@dataclass(frozen=True)
class Models:
    """The user's own objects that a run was trained from: MODEL, MODEL, CLIP and VAE."""

    student: Any
    teacher: Any
    clip: Any
    vae: Any


@dataclass(frozen=True)
class TrainedRun:
    """A run on disk with the models that it needs to go on, and whether to save memory with them."""

    run: Run
    models: Models
    memory_mode: str


@dataclass(frozen=True)
class AdapterFiles:
    """The adapter files of one result, by role: "student" and, where it learned, "teacher"."""

    paths: dict[str, Path]
