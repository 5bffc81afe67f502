"""Loss curves as small SVG plots in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from ..evaluation.svg import COLOURS, new_axes, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Logged term -> title of its plot, in the order of the page.
TERMS = {
    "recon_teacher": "teacher's error (Eq. 1)",
    "identity": "identity (Eq. 2)",
    "mse": "latents (Eq. 3)",
    "swd": "colour and texture (Eq. 4)",
    "alignment": "alignment, weighted (Eq. 5)",
    "adv_dino": "DINO critic (Eq. 6)",
    "adv_dinov2": "DINO v2 critic (Eq. 6)",
    "adv_clip": "CLIP critic (Eq. 6)",
}
_STAGE_COLOURS = ("baseline", "ours")

Rows = Sequence[Mapping[str, float]]
Points = Sequence[tuple[float, float]]  # (iteration, loss)


def curves(losses: Mapping[str, Rows], iterations: Mapping[str, int]) -> list[tuple[str, Markup]]:
    """(title, SVG) for each logged term with a finite value; the stages follow each other on the iteration axis.

    losses: stage -> rows with "step" and the terms. iterations: stage -> its number of iterations, in order.
    """
    starts, total = {}, 0
    for stage, count in iterations.items():
        starts[stage] = total
        total += count
    plots = []
    for term, title in TERMS.items():
        stages = [
            [
                (start + row["step"], row[term])
                for row in losses.get(stage, ())
                if math.isfinite(row.get(term, math.nan))
            ]
            for stage, start in starts.items()
        ]
        if any(stages):
            figure = plot(term, stages, list(starts.values()), total)
            plots.append((title, to_svg(figure, f"{title}: loss over the iterations")))
    return plots


def plot(name: str, stages: Sequence[Points], starts: Sequence[int], total: int) -> Figure:
    """One line of the values and one of their running mean for each stage, with a dashed line between stages.

    name: unique on the page. starts: first iteration of each stage. total: iterations of all stages. The y axis leaves
    out the most extreme hundredth of the values at either end.
    """
    figure, axes = new_axes(f"curve-{name}", (2.5, 1.2), (0.5, 0.08, 0.05, 0.08))
    for points, start, colour in zip(stages, starts, _STAGE_COLOURS, strict=True):
        if start:
            axes.axvline(start, color=COLOURS["faint"], linewidth=0.8, linestyle="dashed")
        if points:
            x, y = zip(*points, strict=True)
            # A line through one point would be invisible.
            color, marker = COLOURS[colour], "." if len(x) == 1 else ""
            axes.plot(x, y, color=color, marker=marker, linewidth=0.7, alpha=0.35)
            axes.plot(x, smoothed(y, max(1, total // 15)), color=color, marker=marker, linewidth=1.5)
    values = sorted(y for points in stages for _, y in points)
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    if high <= low:
        low, high = low - 0.5, high + 0.5
    axes.set_xlim(0, total)
    axes.set_ylim(low, high)
    axes.set_xticks([])
    axes.set_yticks([low, high], [f"{low:.3g}", f"{high:.3g}"])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["faint"])
    return figure


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The running mean: of each value and up to `window` // 2 neighbours on each side, fewer at the ends."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]
