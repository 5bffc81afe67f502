"""Matplotlib figures as inline SVG whose colours are CSS variables of the page, so that they follow light and dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib needs colour values: each of these is replaced by the CSS variable of its name, and used for nothing else.
COLOURS = {
    "ink": "#010203",
    "faint": "#010204",
    "line": "#010205",
    "paper": "#010206",
    "ours": "#010207",
    "baseline": "#010208",
    "variant": "#010209",
    "reference": "#01020a",
}


def new_axes(name: str, size: tuple[float, float], margins: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, whose top and right spines are hidden.

    name: unique on the page, for the ids inside the SVG. size: width and height. margins: left, bottom, right, top; all
    in inches.
    """
    from matplotlib import figure as figures

    (width, height), (left, bottom, right, top) = size, margins
    figure = figures.Figure(figsize=size)
    figure.set_gid(name)
    axes = figure.add_subplot()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLOURS["line"])
    axes.tick_params(colors=COLOURS["ink"], labelsize=8.5, color=COLOURS["line"])
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(COLOURS["ink"])
    return figure, axes


def to_svg(figure: Any, description: str) -> Markup:
    """The figure as one <svg> element that scales to its parent's width; equal figures give equal text.

    description: the label for screen readers.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, in the page's font. The salt keeps the ids of two plots on one page apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.get_gid()}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    # Matplotlib's group ids repeat in every plot, and nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    size = re.search(r'viewBox="0 0 (\S+) ', text)
    text = re.sub(r' (?:width|height)="[0-9.]+pt"', "", text, count=2)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    style = f' style="max-width: {float(size[1]):.0f}pt"' if size else ""
    label = Markup.escape(description)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}"{style} ', 1))  # matplotlib escapes text
