"""Means with 95 % confidence intervals, and paired differences between methods.

A bench measures every method on the same cells: a cell is one concept trained with one seed. Seeds of one concept are
correlated, so the independent unit is the concept: first the mean over a concept's seeds, then Student's t over
concepts. A percentile bootstrap over concepts and seeds is too narrow here: with 6 concepts its 95 % intervals covered
the true mean in only 86 % of some simulated benches; Student's t intervals covered it in 94 to 96 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
# (concept, training seed) -> the value of one metric.
Cells = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval, in the metric's unit, from `units` independent values.

    With one unit the half-width is infinite.
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
    """The estimate over all cells as if they were independent. None without cells.

    Its interval is too narrow where seeds of one concept are correlated; do not compare methods by it.
    """
    return _estimate(cells.values())


def between_seeds(cells: Cells) -> float | None:
    """The standard deviation over training seeds, pooled over concepts. None where no concept has two seeds.

    It is the root of the mean over concepts of the variance (n - 1) over seeds.
    """
    values: dict[str, list[float]] = {}
    for (concept, _), value in cells.items():
        values.setdefault(concept, []).append(value)
    variances = [np.var(v, ddof=1) for v in values.values() if len(v) > 1]
    return math.sqrt(np.mean(variances)) if variances else None


def paired_difference(cells: Cells, others: Cells) -> Estimate | None:
    """The estimate of `cells` minus `others` over the concepts and seeds that both have. None if they share none.

    Pairing removes effects of concept and seed that are the same for both methods. The difference is significant where
    its interval does not contain 0.
    """
    return over_concepts({cell: cells[cell] - others[cell] for cell in cells.keys() & others.keys()})


def concept_means(cells: Cells) -> dict[str, float]:
    """Each concept's mean over its training seeds, by name in alphabetical order."""
    values: dict[str, list[float]] = {}
    for (concept, _), value in sorted(cells.items()):
        values.setdefault(concept, []).append(value)
    return {concept: float(np.mean(v)) for concept, v in values.items()}


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t > 0 for which the interval -t..t holds the share `confidence` of Student's t distribution.

    freedom: degrees of freedom, at least 1.
    """
    return float(stats.t.ppf((1 + confidence) / 2, freedom))


def _estimate(values: Iterable[float]) -> Estimate | None:
    array = np.array(list(values), dtype=np.float64)
    if array.size == 0:
        return None
    if array.size == 1:
        return Estimate(float(array[0]), math.inf, 1)
    return Estimate(float(array.mean()), t_quantile(array.size - 1) * float(stats.sem(array)), int(array.size))
