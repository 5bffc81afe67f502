"""The report's plots: metrics with intervals, and two metrics against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from markupsafe import Markup

from .methods import report_tables
from .paper import BEST, REFERENCES
from .statistics import Estimate
from .summary import METRICS, Row
from .svg import COLOURS, new_axes, to_svg

_MARKERS = {"ours": "o", "baseline": "s", "variant": "o", "reference": "D"}
_OURS = ("echodistill", "echodistill-echo", "echodistill-teacher", "echodistill-echo-teacher", "tuned", "tuned-echo")
_BOX = tuple[float, float, float, float]


def group(method: str) -> str:
    """The group of a method: "ours", "reference", "baseline" (the rest of Table 1) or "variant" (all others)."""
    if method in _OURS:
        return "ours"
    if method in REFERENCES:
        return "reference"
    return "baseline" if any(method in table.methods for table in report_tables() if table.key == "1") else "variant"


def intervals(rows: Sequence[Row], metric: str) -> Markup:
    """One metric of all methods with 95 % intervals, as SVG; empty where no row has it."""
    shown = [row for row in rows if metric in row.estimates]
    if not shown:
        return Markup()
    height = 0.24 * len(shown) + 0.6
    left = 0.3 + _width(max((row.title for row in shown), key=len), 8.5) / 72
    figure, axes = new_axes(f"intervals-{metric}", (left + 2.5, height), (left, 0.5, 0.1, 0.1))
    for y, row in enumerate(reversed(shown)):
        estimate, kind = row.estimates[metric], group(row.method)
        axes.plot(_span(estimate), [y, y], color=COLOURS[kind], linewidth=2, alpha=0.45, solid_capstyle="round")
        axes.plot(estimate.mean, y, **_mark(row.method, 5))
    axes.set_yticks(range(len(shown)), [row.title for row in reversed(shown)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
    return to_svg(figure, f"{METRICS[metric]} of every method with 95 % intervals")


def scatter(rows: Mapping[str, Row], x_metric: str, y_metric: str, labels: tuple[str, str]) -> Markup:
    """Two metrics of the one-step methods and the references as a scatter plot in SVG; empty without points.

    labels: of the two axes. Baselines with their best budget have hollow markers; thin crosses are 95 % intervals.
    """
    shown = [
        row
        for row in rows.values()
        if {x_metric, y_metric} <= row.estimates.keys() and (row.one_step or group(row.method) == "reference")
    ]
    if not shown:
        return Markup()
    # The most important groups are plotted last, on top of the others.
    order = ("variant", "reference", "baseline", "ours")
    shown.sort(key=lambda row: order.index(group(row.method)))
    figure, axes = new_axes(f"{y_metric}-{x_metric}", (11.0, 5.6), (0.75, 0.5, 0.1, 0.1))
    for row in shown:
        x, y, colour = row.estimates[x_metric], row.estimates[y_metric], COLOURS[group(row.method)]
        axes.plot(_span(x), [y.mean, y.mean], color=colour, linewidth=1.2, alpha=0.35)
        axes.plot([x.mean, x.mean], _span(y), color=colour, linewidth=1.2, alpha=0.35)
        axes.plot(x.mean, y.mean, **_mark(row.method, 4 if group(row.method) == "variant" else 7))
    axes.margins(0.12)
    axes.grid(color=COLOURS["line"], linewidth=0.6)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_xlim(axes.get_xlim())  # fixes the scale before labels are placed
    axes.set_ylim(axes.get_ylim())
    axes.text(0.995, 0.985, "better ↗", transform=axes.transAxes, ha="right", va="top", color=COLOURS["faint"])
    _label(axes, [(row.estimates[x_metric], row.estimates[y_metric], row) for row in reversed(shown)])
    return to_svg(figure, f"{labels[1]} against {labels[0]} of the one-step methods")


def _span(estimate: Estimate) -> list[float]:
    """Both ends of the interval; twice the mean where a single concept gives no interval."""
    half = 0.0 if math.isinf(estimate.half_width) else estimate.half_width
    return [estimate.mean - half, estimate.mean + half]


def _mark(method: str, size: float) -> dict[str, Any]:
    kind = group(method)
    return {
        "marker": _MARKERS[kind],
        "markersize": size,
        "color": COLOURS[kind],
        "markerfacecolor": COLOURS["paper"] if method.endswith(BEST) else COLOURS[kind],
        "linestyle": "none",
    }


def _label(axes: Any, points: Sequence[tuple[Estimate, Estimate, Row]]) -> None:
    """Place each point's label greedily where it overlaps least with points, intervals and the labels before it."""
    from matplotlib.transforms import Affine2D

    size, gap = 8.0, 6.0
    scale = 72 / axes.figure.dpi
    to_points = (axes.transData + Affine2D().scale(scale)).transform
    places = [tuple(to_points((x.mean, y.mean))) for x, y, _ in points]
    taken: list[_BOX] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for (x, y), (of_x, of_y, _) in zip(places, points, strict=True):
        ends = [to_points((a, b)) for a, b in zip(_span(of_x), _span(of_y), strict=True)]
        taken += [(ends[0][0], y - 1, ends[1][0], y + 1), (x - 1, ends[0][1], x + 1, ends[1][1])]
    corners = axes.get_window_extent()
    frame = tuple(v * scale for v in (corners.x0, corners.y0, corners.x1, corners.y1))
    taken.append((frame[2] - 70, frame[3] - 20, frame[2], frame[3]))  # the word "better"
    for (x, y), (_, _, row) in zip(places, points, strict=True):
        width, height = _width(row.title, size), 1.15 * size
        candidates = []
        for ring, (right, up) in product(
            (1, 2, 3.5, 5, 7), ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
        ):
            anchor = x + right * gap * ring
            left = anchor - (0 if right > 0 else width if right < 0 else width / 2)
            bottom = y + up * (gap * ring + height / 2) - height / 2
            box = (left, bottom, left + width, bottom + height)
            hidden = sum(_overlap(box, other) for other in taken) + 2 * (width * height - _overlap(box, frame))
            candidates.append((hidden + ring, ring > 1, box, anchor, right))
        _, apart, box, anchor, right = min(candidates, key=lambda candidate: candidate[0])
        taken.append(box)
        kind = group(row.method)
        axes.annotate(
            row.title,
            (x, y),
            (anchor, box[1]),
            xycoords="figure points",
            textcoords="figure points",
            ha={1: "left", -1: "right", 0: "center"}[right],
            va="bottom",
            fontsize=size,
            color=COLOURS["faint" if kind == "variant" else kind],
            fontweight="bold" if kind == "ours" else "normal",
            # A thin line connects the point with a label that is not beside it.
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS["faint"],
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0.5 - right / 2, 0.5),
            }
            if apart
            else None,
        )


def _width(text: str, size: float) -> float:
    """Approximate width of the text in points: an average letter is 0.58 times as wide as the font size."""
    return 0.58 * size * len(text)


def _overlap(a: _BOX, b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
