"""Text of a summary's figures and facts, shared by the Markdown and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .methods import method_title
from .paper import Ordering
from .statistics import Estimate
from .summary import Row, Summary, Verdict

SCALES = (
    "The paper's figures were measured on DreamBench with large encoders, ours with other images and other encoders: "
    "compare the order of methods, never the size of a figure."
)
INTERVALS = (
    "± is the half-width of the 95 % confidence interval by Student's t over concepts; each concept contributes its "
    "mean over training seeds. Diverged runs count only in the column of that name. An ordering agrees where the 95 % "
    "interval of the paired difference, over the same concepts and seeds, lies above 0. It agrees within the interval "
    "where only the mean difference lies above 0 (not significant), and does not hold otherwise."
)
SEEDS_APART = "DINO, SD over seeds"


def number(estimate: Estimate | None) -> str:
    """The mean and the half-width of its interval: "0.637 ± 0.021", or "0.637 (one concept)"; a dash for None."""
    if estimate is None:
        return "–"
    if math.isinf(estimate.half_width):
        return f"{estimate.mean:.3f} (one concept)"
    return f"{estimate.mean:.3f} ± {estimate.half_width:.3f}"


def claim(ordering: Ordering) -> str:
    """The claim of the paper in words: "EchoDistill, before echo > LoRA"."""
    return f"{method_title(ordering.better)} {'>' if ordering.strict else '≥'} {method_title(ordering.worse)}"


def difference(verdict: Verdict) -> str:
    """Better minus worse: "+0.120 ± 0.031"; "not measured" without common cells."""
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
    """The number of iterations, or their range where runs differ: "100–400"; a dash for untrained rows."""
    trained = [count for count in row.iterations if count]
    if not trained:
        return "–"
    low, high = trained[0], trained[-1]
    return str(low) if low == high else f"{low}–{high}"


def left_out(summary: Summary) -> list[str]:
    """Sentences on the methods and cells that the bench did not measure."""
    lines = []
    if summary.left_out:
        lines.append("Not run: " + "; ".join(method_title(method) for method in summary.left_out) + ".")
    if summary.gaps:
        gaps = (f"{method_title(method)} ({have} of {whole})" for method, (have, whole) in summary.gaps.items())
        lines.append("Not on every concept and seed: " + "; ".join(gaps) + ".")
    return lines or ["Nothing: every method ran on every concept and seed."]


def one_line(value: Any) -> str:
    """A value of the header in one line: lists with commas, mappings as "name value"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one_line(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(one_line(v) for v in value)
    return str(value)
