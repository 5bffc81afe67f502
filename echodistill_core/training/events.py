"""What a running stage reports. Progress bars, contact sheets and tests are listeners of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class StepDone:
    """An iteration ended. losses: term -> scalar tensor on the training device; reading one waits for the device."""

    stage: str
    step: int
    iterations: int
    losses: Mapping[str, Tensor]


@dataclass(frozen=True)
class LossesLogged:
    """Losses of the iterations since the last log, as numbers, checked to be finite."""

    stage: str
    rows: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class PreviewReady:
    """One-step samples of the student as it is now: (B, 3, H, W) in [-1, 1], with the prompts and seeds fixed."""

    stage: str
    step: int
    images: Tensor


@dataclass(frozen=True)
class CheckpointSaved:
    """The state of this step is kept. On a GPU the file may still be being written, behind training."""

    stage: str
    step: int
    path: Path


@dataclass(frozen=True)
class PoolProgress:
    """A pool has so many of its images. name: "pool" is the echoing stage's, "class images" are the prior's."""

    done: int
    size: int
    name: str = "pool"


def latest(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The last value of every term in these rows of losses: not every iteration has all of them."""
    found: dict[str, float] = {}
    for row in rows:
        found |= row
    return found


def current_names(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses of a log under today's names. Version 0.1.0 wrote fool_x, x_gradient, teacher, student and x_prior."""
    return {_current_name(name): value for name, value in losses.items()}


def _current_name(name: str) -> str:
    if name in ("teacher", "student"):
        return f"recon_{name}"
    if name == "critic_gradient":
        return "grad_norm_critics"
    renamed = ((r"fool_(\w+)", r"adv_\1"), (r"(\w+)_gradient", r"grad_norm_\1"), (r"(\w+)_prior", r"prior_\1"))
    for pattern, replacement in renamed:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


Event = StepDone | LossesLogged | PreviewReady | CheckpointSaved | PoolProgress
Listener = Callable[[Event], None]
