"""The pack's own socket types and the objects that they pass."""

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
    """The subject to learn: its unprocessed photographs, class noun, placeholder and crop mode."""

    photographs: tuple[Photograph, ...]
    class_noun: str
    placeholder: str
    crop: str


@dataclass(frozen=True)
class Models:
    """The user's MODEL (student), MODEL (teacher), CLIP and VAE objects of a run."""

    student: Any
    teacher: Any
    clip: Any
    vae: Any


@dataclass(frozen=True)
class TrainedRun:
    """A run on disk, the models to continue it with, and the memory mode."""

    run: Run
    models: Models
    memory_mode: str


@dataclass(frozen=True)
class AdapterFiles:
    """The adapter files of one result by role: "student" and, if it was trained, "teacher"."""

    paths: dict[str, Path]
