"""The course of the learning rates over a stage."""

from __future__ import annotations

import math

from .build import parameter_groups
from .state import TrainState

Rates = dict[str, list[float]]


def decay(course: str, step: int, iterations: int) -> float:
    """Share in [0, 1] of the full learning rate at this step of a stage.

    course: "constant", or "cosine" for (1 + cos(pi step / iterations)) / 2 (Loshchilov and Hutter 2017, Eq. 5).
    """
    return 0.5 * (1 + math.cos(math.pi * step / iterations)) if course == "cosine" else 1.0


def full_rates(state: TrainState) -> Rates:
    """The settings' learning rate of each parameter group, by optimiser."""
    return {name: [group["lr"] for group in groups] for name, groups in parameter_groups(state).items()}


def set_rates(state: TrainState, rates: Rates, share: float) -> None:
    """Give every parameter group this share of its full rate."""
    for name, optimizer in state.trainables.optimizers.items():
        for group, rate in zip(optimizer.param_groups, rates[name], strict=True):
            group["lr"] = rate * share
