"""Learning rate schedules over a stage.

torch.optim.lr_scheduler has the same schedules, but with state of its own; here the rate is a function of the step, so
a checkpoint needs no scheduler state.
"""

from __future__ import annotations

import math

from .build import parameter_groups
from .state import TrainState

Rates = dict[str, list[float]]


def decay(schedule: str, step: int, iterations: int) -> float:
    """Factor in [0, 1] of the initial learning rate at a step, 0..iterations, of a stage.

    schedule: "constant" for 1, or "cosine" for (1 + cos(pi step / iterations)) / 2 (Loshchilov and Hutter 2017, Eq. 5).
    """
    return 0.5 * (1 + math.cos(math.pi * step / iterations)) if schedule == "cosine" else 1.0


def full_rates(state: TrainState) -> Rates:
    """Player -> learning rate of each parameter group before decay, in the order of the optimiser's groups."""
    return {name: [group["lr"] for group in groups] for name, groups in parameter_groups(state).items()}


def set_rates(state: TrainState, rates: Rates, factor: float) -> None:
    """Set the learning rate of every parameter group to factor * its rate in `rates` (`full_rates`)."""
    for name, optimizer in state.trainables.optimizers.items():
        for group, rate in zip(optimizer.param_groups, rates[name], strict=True):
            group["lr"] = rate * factor
