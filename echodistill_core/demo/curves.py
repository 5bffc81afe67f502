"""Loss curves as small inline SVG plots in the page's own colours."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

# Logged term -> what its plot is called, in the order of the page.
TERMS = {
    "teacher": "teacher's error (Eq. 1)",
    "identity": "identity (Eq. 2)",
    "mse": "latents (Eq. 3)",
    "swd": "colour and texture (Eq. 4)",
    "alignment": "alignment, weighted (Eq. 5)",
    "fool_dino": "DINO critic (Eq. 6)",
    "fool_dinov2": "DINO v2 critic (Eq. 6)",
    "fool_clip": "CLIP critic (Eq. 6)",
}
WIDTH, HEIGHT, MARGIN = 190.0, 80.0, 34.0  # of a plot's field, and of the figures left of it

Rows = Sequence[Mapping[str, float]]


def curves(losses: Mapping[str, Rows], iterations: Mapping[str, int]) -> str:
    """One plot for each term that was logged, the stages one after the other, as HTML; "" where nothing was.

    losses: stage -> rows with "step" and the terms. iterations: stage -> how many it has.
    """
    offsets, total = {}, 0
    for stage, count in iterations.items():
        offsets[stage] = total
        total += count
    dividers = [offset for offset in offsets.values() if offset]
    plots = []
    for term, title in TERMS.items():
        lines = {
            stage: [(offsets[stage] + row["step"], row[term]) for row in losses.get(stage, ()) if term in row]
            for stage in offsets
        }
        if any(lines.values()):
            plots.append(
                f"<figure><figcaption>{html.escape(title)}</figcaption>"
                f"{_plot(list(lines.values()), total, dividers, title)}</figure>"
            )
    return f'<div class="curves">{"".join(plots)}</div>' if plots else ""


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and its `window` // 2 neighbours on each side, as far as there are so many."""
    half = window // 2
    parts = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _plot(lines: Sequence[Sequence[tuple[float, float]]], total: int, dividers: Sequence[int], title: str) -> str:
    """Every line once as it is, faintly, and once smoothed. The scale leaves out the most extreme hundredth."""
    values = sorted(y for line in lines for _, y in line if math.isfinite(y))
    if not values:
        return ""
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    if high <= low:
        low, high = low - 0.5, high + 0.5

    def place(x: float, y: float) -> str:
        down = (high - min(max(y, low), high)) / (high - low)
        return f"{x / max(total, 1) * WIDTH:.1f},{down * HEIGHT:.1f}"

    parts = [f'<path class="axis" d="M0,0V{HEIGHT:g}H{WIDTH:g}"/>']
    parts += [f'<path class="divider" d="M{x / total * WIDTH:.1f},0V{HEIGHT:g}"/>' for x in dividers]
    for stage, line in enumerate(lines):
        finite = [(x, y) for x, y in line if math.isfinite(y)]
        smooth = smoothed([y for _, y in finite], max(1, total // 15))
        for kind, ys in (("raw", [y for _, y in finite]), ("smooth", smooth)):
            points = [place(x, y) for (x, _), y in zip(finite, ys, strict=True)]
            # A line through one point would be invisible.
            points = points * 2 if len(points) == 1 else points
            if points:
                parts.append(f'<polyline class="{kind} stage{stage}" points="{" ".join(points)}"/>')
    labels = f'<text x="-4" y="8">{high:.3g}</text><text x="-4" y="{HEIGHT:g}">{low:.3g}</text>'
    return (
        f'<svg viewBox="{-MARGIN:g} -2 {WIDTH + MARGIN + 2:g} {HEIGHT + 4:g}" role="img" '
        f'aria-label="{html.escape(title)}: loss over the iterations">{"".join(parts)}{labels}</svg>'
    )
