import math
import statistics

import numpy as np
import pytest
from scipy import stats

from echodistill_core.evaluation.statistics import (
    Estimate,
    between_seeds,
    concept_means,
    over_cells,
    over_concepts,
    paired_difference,
    t_quantile,
)

# The two-sided 95 % row of any printed table of Student's t.
PRINTED = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 17: 2.110, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("freedom", "expected"), PRINTED.items())
def test_t_quantiles_are_those_of_printed_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_t_quantiles_are_those_of_scipy(confidence):
    for freedom in (1, 2, 3, 4, 7, 8, 25, 53, 200):
        assert t_quantile(freedom, confidence) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


def test_the_interval_by_hand():
    estimate = over_cells({("a", 0): 0.2, ("b", 0): 0.4, ("c", 0): 0.9})
    # Mean 0.5, deviation sqrt((0.09 + 0.01 + 0.16) / 2), t of 2 degrees of freedom.
    half = 4.303 * math.sqrt(0.13) / math.sqrt(3)
    assert estimate.mean == pytest.approx(0.5)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-3)
    assert estimate.units == 3


def test_a_concept_counts_once_however_many_seeds_it_has():
    cells = {("mug", 0): 0.0, ("mug", 1): 0.2, ("mug", 2): 0.4, ("cat", 0): 1.0}
    assert concept_means(cells) == pytest.approx({"cat": 1.0, "mug": 0.2})
    estimate = over_concepts(cells)
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.units == 2
    assert over_cells(cells).mean == pytest.approx(0.4)
    assert over_cells(cells).units == 4


def test_copies_of_a_seed_narrow_the_interval_over_cells_only():
    once = {(c, 0): v for c, v in zip("abcd", (0.1, 0.5, 0.6, 0.9), strict=True)}
    thrice = {(c, s): v for (c, _), v in once.items() for s in range(3)}
    assert over_concepts(thrice).half_width == pytest.approx(over_concepts(once).half_width)
    assert over_cells(thrice).half_width < 0.6 * over_cells(once).half_width


def test_one_concept_alone_has_no_interval():
    assert over_concepts({("mug", 0): 0.3, ("mug", 1): 0.5}) == Estimate(pytest.approx(0.4), math.inf, 1)


def test_nothing_gives_no_estimate():
    assert over_concepts({}) is None
    assert over_cells({}) is None
    assert paired_difference({("a", 0): 1.0}, {("a", 1): 1.0}) is None


def test_paired_differences_take_out_what_concepts_do_to_both():
    concepts = {"a": 0.1, "b": 0.5, "c": 0.9, "d": 0.3}
    noise = {"a": 0.01, "b": -0.01, "c": 0.0, "d": 0.02}
    worse = {(c, s): v + 0.03 * s for c, v in concepts.items() for s in range(2)}
    better = {(c, s): v + 0.05 + noise[c] for (c, s), v in worse.items()}
    difference = paired_difference(better, worse)
    values = [0.05 + n for n in noise.values()]
    assert difference.mean == pytest.approx(statistics.mean(values))
    assert difference.half_width == pytest.approx(3.182 * statistics.stdev(values) / 2, rel=1e-3)
    # Each method for itself spreads far too much to tell.
    assert over_concepts(better).low < over_concepts(worse).high


def test_paired_differences_use_common_cells_only():
    difference = paired_difference(
        {("a", 0): 1.0, ("a", 1): 5.0, ("b", 0): 2.0}, {("a", 0): 0.5, ("b", 0): 1.5, ("c", 0): -9.0}
    )
    assert difference.mean == pytest.approx(0.5)
    assert difference.units == 2


def test_intervals_over_concepts_hold_the_truth_in_95_of_100_benches():
    random = np.random.default_rng(0)
    hits, benches = 0, 2000
    for _ in range(benches):
        concepts = random.normal(0.4, 0.1, 6)
        cells = {(str(c), s): random.normal(concepts[c], 0.05) for c in range(6) for s in range(3)}
        estimate = over_concepts(cells)
        hits += estimate.low <= 0.4 <= estimate.high
    # Four standard errors of a share of 0.95 in 2000 trials.
    assert hits / benches == pytest.approx(0.95, abs=0.02)


def test_spread_between_seeds_is_pooled_over_concepts():
    cells = {("a", 0): 0.1, ("a", 1): 0.3, ("b", 0): 0.5, ("b", 1): 0.5, ("b", 2): 0.8, ("alone", 0): 9.0}
    # Variances 0.02 and 0.03, by hand.
    assert between_seeds(cells) == pytest.approx(math.sqrt(0.025))
    shifted = {cell: value + (cell[0] == "a") for cell, value in cells.items()}
    assert between_seeds(shifted) == pytest.approx(between_seeds(cells))
    assert between_seeds({("a", 0): 1.0, ("b", 0): 2.0}) is None
