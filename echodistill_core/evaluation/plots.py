"""The report's plots as inline SVG whose colours are the page's own variables, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from .paper import BASELINES, BEST, REFERENCES
from .statistics import Estimate
from .summary import METRICS, Row

# Matplotlib wants real colours; these stand for CSS variables and appear nowhere else.
_COLOURS = {
    "ink": "#010203",
    "faint": "#010204",
    "line": "#010205",
    "paper": "#010206",
    "ours": "#010207",
    "baseline": "#010208",
    "variant": "#010209",
    "reference": "#01020a",
}
_MARKERS = {"ours": "o", "baseline": "s", "variant": "o", "reference": "D"}
_OURS = ("echodistill", "echodistill-echo", "echodistill-teacher", "echodistill-echo-teacher", "tuned", "tuned-echo")
_BOX = tuple[float, float, float, float]


def group(method: str) -> str:
    """Which of "ours", "baseline", "reference" or "variant" (ablations and what else there is) a method is."""
    name = method.removesuffix(BEST)
    if name in _OURS:
        return "ours"
    return "baseline" if name in BASELINES else "reference" if name in REFERENCES else "variant"


def intervals(rows: Sequence[Row], metric: str) -> str:
    """One metric of all methods with 95 % intervals, as SVG; "" where no row has it."""
    shown = [row for row in rows if metric in row.estimates]
    if not shown:
        return ""
    height = 0.24 * len(shown) + 0.6
    left = 0.3 + _width(max((row.title for row in shown), key=len), 8.5) / 72
    figure, axes = _axes(f"intervals-{metric}", left + 2.5, height, left)
    for y, row in enumerate(reversed(shown)):
        estimate, kind = row.estimates[metric], group(row.method)
        axes.plot(_span(estimate), [y, y], color=_COLOURS[kind], linewidth=2, alpha=0.45, solid_capstyle="round")
        axes.plot(estimate.mean, y, **_mark(row.method, 5))
    axes.set_yticks(range(len(shown)), [row.title for row in reversed(shown)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.grid(axis="x", color=_COLOURS["line"], linewidth=0.6)
    return _svg(figure, f"{METRICS[metric]} of every method with 95 % intervals")


def against(rows: Mapping[str, Row], across: str, upwards: str, labels: tuple[str, str]) -> str:
    """Two metrics of every one-step method and of the references against each other, as SVG; "" without points.

    labels: of the two axes. Methods at their best budget are hollow; thin crosses are 95 % intervals.
    """
    shown = [
        row
        for row in rows.values()
        if {across, upwards} <= row.estimates.keys() and (row.one_step or group(row.method) == "reference")
    ]
    if not shown:
        return ""
    # The most important last, so that they lie on top.
    order = ("variant", "reference", "baseline", "ours")
    shown.sort(key=lambda row: order.index(group(row.method)))
    figure, axes = _axes(f"{upwards}-{across}", 11.0, 5.6, left=0.75)
    for row in shown:
        x, y, colour = row.estimates[across], row.estimates[upwards], _COLOURS[group(row.method)]
        axes.plot(_span(x), [y.mean, y.mean], color=colour, linewidth=1.2, alpha=0.35)
        axes.plot([x.mean, x.mean], _span(y), color=colour, linewidth=1.2, alpha=0.35)
        axes.plot(x.mean, y.mean, **_mark(row.method, 4 if group(row.method) == "variant" else 7))
    axes.margins(0.12)
    axes.grid(color=_COLOURS["line"], linewidth=0.6)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_xlim(axes.get_xlim())  # settles the scale, which labels are placed in
    axes.set_ylim(axes.get_ylim())
    axes.text(0.995, 0.985, "the prize ↗", transform=axes.transAxes, ha="right", va="top", color=_COLOURS["faint"])
    _label(axes, [(row.estimates[across], row.estimates[upwards], row) for row in reversed(shown)])
    return _svg(figure, f"{labels[1]} against {labels[0]} of the one-step methods")


def _span(estimate: Estimate) -> list[float]:
    """Both ends of the interval; the mean twice where one concept alone says nothing about it."""
    half = 0.0 if math.isinf(estimate.half_width) else estimate.half_width
    return [estimate.mean - half, estimate.mean + half]


def _mark(method: str, size: float) -> dict[str, Any]:
    kind = group(method)
    return {
        "marker": _MARKERS[kind],
        "markersize": size,
        "color": _COLOURS[kind],
        "markerfacecolor": _COLOURS["paper"] if method.endswith(BEST) else _COLOURS[kind],
        "linestyle": "none",
    }


def _axes(name: str, width: float, height: float, left: float) -> tuple[Any, Any]:
    """An empty figure of this size in inches with one pair of axes; `left` inches are for what stands beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_gid(name)
    axes = figure.add_subplot()
    figure.subplots_adjust(left / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.1 / height)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_COLOURS["line"])
    axes.tick_params(colors=_COLOURS["ink"], labelsize=8.5, color=_COLOURS["line"])
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_COLOURS["ink"])
    return figure, axes


def _label(axes: Any, points: Sequence[tuple[Estimate, Estimate, Row]]) -> None:
    """Write each point's name where it covers the least of points, intervals and names; the first choose first."""
    from matplotlib.transforms import Affine2D

    size, gap = 8.0, 6.0
    scale = 72 / axes.figure.dpi
    to_points = (axes.transData + Affine2D().scale(scale)).transform
    places = [tuple(to_points((x.mean, y.mean))) for x, y, _ in points]
    taken: list[_BOX] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for (x, y), (across, upwards, _) in zip(places, points, strict=True):
        ends = [to_points((a, b)) for a, b in zip(_span(across), _span(upwards), strict=True)]
        taken += [(ends[0][0], y - 1, ends[1][0], y + 1), (x - 1, ends[0][1], x + 1, ends[1][1])]
    corners = axes.get_window_extent()
    frame = tuple(v * scale for v in (corners.x0, corners.y0, corners.x1, corners.y1))
    taken.append((frame[2] - 70, frame[3] - 20, frame[2], frame[3]))  # the prize
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
            color=_COLOURS["faint" if kind == "variant" else kind],
            fontweight="bold" if kind == "ours" else "normal",
            # A thin line to the point from where the name could not stand beside it.
            arrowprops={
                "arrowstyle": "-",
                "color": _COLOURS["faint"],
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0.5 - right / 2, 0.5),
            }
            if apart
            else None,
        )


def _width(text: str, size: float) -> float:
    """About how wide the text is in points: an average letter is a little more than half as wide as it is high."""
    return 0.58 * size * len(text)


def _overlap(a: _BOX, b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _svg(figure: Any, description: str) -> str:
    """The figure as one <svg> element that fills its parent's width; equal figures give equal text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, in the page's font. The salt keeps the ids of two plots on one page apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.get_gid()}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    # Every plot numbers its groups anew, and nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    size = re.search(r'viewBox="0 0 (\S+) ', text)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    style = f' style="max-width: {float(size[1]):.0f}pt"' if size else ""
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}"{style} ', 1)
