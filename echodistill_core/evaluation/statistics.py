"""Means with 95 % intervals, and whether one method differs from another by more than chance.

A bench measures every method on the same cells: a cell is one concept trained with one seed. Seeds of one concept are
alike, so the independent unit is the concept: first the mean over a concept's seeds, then Student's t over concepts.
A percentile bootstrap over concepts and their seeds would be too narrow here: with 6 concepts its 95 % intervals hold
the truth in as little as 86 % of simulated benches, where Student's hold it in 94 to 96 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
# (concept, training seed) -> the value of one metric.
Cells = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval, in the metric's unit, from `units` independent values.

    One unit alone says nothing about its spread: its interval is infinite.
    """

    mean: float
    half_width: float
    units: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width


def over_concepts(cells: Cells) -> Estimate | None:
    """The estimate to report: each concept counts once, with its mean over seeds. None without cells."""
    return _estimate(concept_means(cells).values())


def over_cells(cells: Cells) -> Estimate | None:
    """Every cell as if it were independent: the spread over concepts and seeds together. None without cells.

    Narrower than it should be wherever seeds of one concept are alike; never compare methods by it.
    """
    return _estimate(cells.values())


def between_seeds(cells: Cells) -> float | None:
    """How much runs differ that only their seed tells apart: the standard deviation over a concept's seeds, pooled.

    The root of the mean over concepts of the variance (n - 1) over seeds. None where no concept has two seeds.
    """
    values: dict[str, list[float]] = {}
    for (concept, _), value in cells.items():
        values.setdefault(concept, []).append(value)
    variances = [np.var(v, ddof=1) for v in values.values() if len(v) > 1]
    return math.sqrt(np.mean(variances)) if variances else None


def paired_difference(cells: Cells, others: Cells) -> Estimate | None:
    """How far `cells` lie above `others`, over the concepts and seeds that both have. None if there is none.

    Pairing takes out what a concept or seed does to all methods alike. Beyond the intervals means that this
    interval does not contain 0.
    """
    return over_concepts({cell: cells[cell] - others[cell] for cell in cells.keys() & others.keys()})


def concept_means(cells: Cells) -> dict[str, float]:
    """Each concept's mean over its training seeds, by name in alphabetical order."""
    values: dict[str, list[float]] = {}
    for (concept, _), value in sorted(cells.items()):
        values.setdefault(concept, []).append(value)
    return {concept: float(np.mean(v)) for concept, v in values.items()}


@lru_cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t > 0 for which Student's distribution has the share `confidence` within -t..t.

    freedom: degrees of freedom, at least 1. By bisection of Abramowitz and Stegun's 26.7.3 and 26.7.4 over the angle
    atan(t / sqrt(freedom)), in which the share is monotonic.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _share_within(angle: float, freedom: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    # 1, 1/2 cos^2, 1*3/(2*4) cos^4, ... or cos, 2/3 cos^3, 2*4/(3*5) cos^5, ..., up to cos^(freedom - 2).
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def _estimate(values: Iterable[float]) -> Estimate | None:
    array = np.array(list(values), dtype=np.float64)
    if array.size == 0:
        return None
    if array.size == 1:
        return Estimate(float(array[0]), math.inf, 1)
    error = float(array.std(ddof=1)) / math.sqrt(array.size)
    return Estimate(float(array.mean()), t_quantile(array.size - 1) * error, int(array.size))
