"""How figures and facts of a summary read in words, the same in Markdown and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .paper import Ordering, title_of
from .statistics import Estimate
from .summary import Row, Summary, Verdict

SCALES = (
    "The paper's figures come from DreamBench and large encoders, ours from other pictures and other judges: "
    "compare the order of methods, never the size of a figure."
)
INTERVALS = (
    "± is half of the 95 % interval by Student's t over concepts, each with its mean over training seeds. Runs that "
    "diverged count only in their own column. An ordering agrees where the 95 % interval of the paired difference, "
    "over the same concepts and seeds, lies above 0."
)

SEEDS_APART = "DINO, SD over seeds"


def number(estimate: Estimate | None) -> str:
    """The mean with half its interval: "0.637 ± 0.021", or "0.637 (one concept)"; a dash for None."""
    if estimate is None:
        return "–"
    if math.isinf(estimate.half_width):
        return f"{estimate.mean:.3f} (one concept)"
    return f"{estimate.mean:.3f} ± {estimate.half_width:.3f}"


def claim(ordering: Ordering) -> str:
    """What the paper claims: "EchoDistill, before echo > LoRA"."""
    return f"{title_of(ordering.better)} {'>' if ordering.strict else '≥'} {title_of(ordering.worse)}"


def difference(verdict: Verdict) -> str:
    """How far better lies above worse: "+0.120 ± 0.031"; "not measured" where there is nothing to compare."""
    if verdict.difference is None:
        return verdict.word
    return ("+" if verdict.difference.mean > 0 else "") + number(verdict.difference)


def diverged(row: Row) -> str:
    """The share of runs that diverged, in percent: "6 %"; a dash where there are no runs."""
    return f"{100 * row.diverged / row.cells:.0f} %" if row.cells else "–"


def seeds_apart(row: Row) -> str:
    """The standard deviation of DINO over the seeds of a concept: "0.031"; a dash where no concept has two."""
    return "–" if row.seeds_apart is None else f"{row.seeds_apart:.3f}"


def iterations(row: Row) -> str:
    """The number of iterations, or from fewest to most where concepts differ: "100–400"; a dash untrained."""
    trained = [count for count in row.iterations if count]
    if not trained:
        return "–"
    low, high = trained[0], trained[-1]
    return str(low) if low == high else f"{low}–{high}"


def left_out(summary: Summary) -> list[str]:
    """What the bench did not measure, in sentences."""
    lines = []
    if summary.left_out:
        lines.append("Not run: " + "; ".join(title_of(method) for method in summary.left_out) + ".")
    if summary.gaps:
        gaps = (f"{title_of(method)} ({have} of {whole})" for method, (have, whole) in summary.gaps.items())
        lines.append("Not on every concept and seed: " + "; ".join(gaps) + ".")
    return lines or ["Nothing: every method ran on every concept and seed."]


def one_line(value: Any) -> str:
    """A value of the header in one line: lists with commas, mappings as "name value"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one_line(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(one_line(v) for v in value)
    return str(value)
