"""Events of a running stage, for listeners such as progress bars, contact sheets and logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class StepDone:
    """An iteration ended. step: its number, from 1 to iterations.

    losses: name -> scalar tensor on the training device; reading its value waits for the device.
    """

    stage: str
    step: int
    iterations: int
    losses: Mapping[str, Tensor]


@dataclass(frozen=True)
class LossesLogged:
    """Losses were logged. rows: one per iteration since the previous event, with "step" and finite losses by name."""

    stage: str
    rows: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class PreviewReady:
    """One-step samples of the current student. images: (B, 3, H, W) in [-1, 1]; prompts and seeds never change."""

    stage: str
    step: int
    images: Tensor


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was taken after `step` iterations. On a GPU, a thread may still be writing its file."""

    stage: str
    step: int
    path: Path


@dataclass(frozen=True)
class PoolProgress:
    """`done` of the `size` images of a pool exist. name: "pool" in the echoing stage, "ROLE's class images" for the
    prior.
    """

    done: int
    size: int
    name: str = "pool"


def latest(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The last value of every loss in these rows; a row may lack losses that its iteration did not compute."""
    found: dict[str, float] = {}
    for row in rows:
        found |= row
    return found


_OLD_NAMES = {
    "teacher": "recon_teacher",
    "student": "recon_student",
    "teacher_prior": "prior_teacher",
    "student_prior": "prior_student",
    "teacher_gradient": "grad_norm_teacher",
    "student_gradient": "grad_norm_student",
    "critic_gradient": "grad_norm_critics",
    **{f"fool_{critic}": f"adv_{critic}" for critic in ("clip", "dino", "dinov2")},
}


def current_names(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses by their present names. Logs before 2026-11-28 have the names on the left of `_OLD_NAMES`."""
    return {_OLD_NAMES.get(name, name): value for name, value in losses.items()}


Event = StepDone | LossesLogged | PreviewReady | CheckpointSaved | PoolProgress
Listener = Callable[[Event], None]
