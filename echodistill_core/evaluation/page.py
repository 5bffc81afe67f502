"""The report as one self-contained HTML page, with pictures and plots inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .html import TEMPLATES, data_uri, render
from .methods import report_tables
from .paper import REFERENCES
from .plots import group, intervals, scatter
from .sheets import open_picture
from .summary import (
    AGREES,
    FAILS,
    METRICS,
    PUBLISHED,
    UNKNOWN,
    VERDICTS,
    WITHIN,
    Result,
    Row,
    Section,
    Summary,
    Verdict,
    by_claim,
)
from .wording import (
    SEEDS_APART,
    claim,
    difference,
    diverged,
    iterations,
    left_out,
    number,
    one_line,
    seeds_apart,
)

_SIGNS = {AGREES: "✓", WITHIN: "≈", FAILS: "✗", UNKNOWN: "–"}
_CLASSES = {AGREES: "yes", WITHIN: "nearly", FAILS: "no", UNKNOWN: "unknown"}
_GROUPS = (("ours", "EchoDistill"), ("baseline", "baselines"), ("variant", "variants"), ("reference", "references"))
_SCATTERS = (
    ("clip_t", "dino", ("prompt (CLIP-T)", "identity (DINO)")),
    ("context", "attributes", ("context accuracy", "attribute accuracy")),
)


def render_page(summary: Summary, folder: Path, notes: Sequence[str] = ()) -> str:
    """The page as HTML text. folder: of the bench, with its pictures. notes: sentences on how to read the report.

    A picture that is missing or cannot be read is replaced by a note.
    """
    header = dict(summary.header)
    title = str(header.pop("title", "The tables, measured"))
    rows = _ordered(summary)
    return render(
        TEMPLATES / "report.html.j2",
        title=title,
        meta=[one_line(header[key]) for key in ("date", "machine") if header.get(key)],
        tiles=_tiles(summary),
        groups=_GROUPS,
        scatters=[plot for axes in _SCATTERS if (plot := scatter(summary.rows, *axes))],
        pictures=_pictures(summary, rows, folder),
        tables=[_table(section) for section in summary.sections],
        signs=", ".join(f"{sign} {word}" for word, sign in _SIGNS.items()),
        published=[METRICS[metric] for metric in PUBLISHED],
        orderings=_orderings(summary.verdicts),
        intervals=[(name, plot) for metric, name in METRICS.items() if (plot := intervals(rows, metric))],
        notes=notes,
        left_out=left_out(summary),
        facts={key: _lines(value) for key, value in header.items()},
    )


def _lines(value: Any) -> list[str]:
    """A fact of the header: a mapping with one entry a line, anything else in one line."""
    if isinstance(value, Mapping) and value:
        return [f"{key} {one_line(v)}" for key, v in value.items()]
    return [one_line(value)]


def _tiles(summary: Summary) -> list[dict[str, Any]]:
    counts: list[tuple[int, str, str]] = [
        (len(summary.concepts), "concepts", ""),
        (len(summary.rows), "methods", ""),
        (len(summary.cells), "results", ""),
        (sum(cell.diverged for cell in summary.cells), "of them diverged", ""),
        *((sum(v.word == w for v in summary.verdicts), f"orderings: {w}", _CLASSES[w]) for w in VERDICTS),
    ]
    return [{"value": value, "label": label, "css": css} for value, label, css in counts]


def _ordered(summary: Summary) -> list[Row]:
    """The measured rows in the order of the tables, then those of no table."""
    order = dict.fromkeys(method for table in report_tables() for method in table.methods)
    return [summary.rows[m] for m in dict.fromkeys((*order, *summary.rows)) if m in summary.rows]


def _table(section: Section) -> dict[str, Any]:
    published = any(row.paper for row in section.rows)
    heads = [{"text": "method", "css": ""}]
    for metric, name in METRICS.items():
        heads.append({"text": name, "css": "n"})
        if published and metric in PUBLISHED:
            heads.append({"text": "paper", "css": "n p"})
        if metric == PUBLISHED[-1]:
            heads.append({"text": "the paper's ordering", "css": ""})
    heads += [{"text": name, "css": "n"} for name in ("runs", "diverged", SEEDS_APART, "iterations", "seconds")]
    return {
        "title": section.table.title,
        "question": section.table.question,
        "heads": heads,
        "rows": [_row(row, published) for row in section.rows],
    }


def _row(row: Row, published: bool) -> dict[str, Any]:
    cells = []
    for metric in METRICS:
        estimate, alone = row.estimates.get(metric), row.spreads.get(metric)
        hint = f"over all {alone.units} runs as independent units: {number(alone)}" if alone else ""
        cells.append(_cell(number(estimate), "n", hint))
        if published and metric in PUBLISHED:
            figure = row.paper.value(metric) if row.paper else None
            cells.append(_cell("–" if figure is None else f"{figure:.3f}", "n p"))
        if metric == PUBLISHED[-1]:
            cells.append(_cell("", badges=[_badge(v, _direction(v, row)) for v in row.verdicts]))
    seconds = "–" if row.seconds is None else f"{row.seconds:.1f}"
    facts = (str(row.cells or "–"), diverged(row), seeds_apart(row), iterations(row), seconds)
    cells += [_cell(text, "n") for text in facts]
    return {"title": row.title, "css": group(row.method) if row.cells else "absent", "cells": cells}


def _cell(text: str, css: str = "", hint: str = "", badges: Sequence[Mapping[str, str]] = ()) -> dict[str, Any]:
    return {"text": text, "css": css, "hint": hint, "badges": badges}


def _direction(verdict: Verdict, row: Row) -> str:
    """The metric with an arrow: "DINO ↓" where the paper has this row below the method that it is compared with."""
    return f"{METRICS[verdict.ordering.metric]} {'↑' if verdict.ordering.better == row.method else '↓'}"


def _badge(verdict: Verdict, text: str) -> dict[str, str]:
    hint = f"{claim(verdict.ordering)} by {METRICS[verdict.ordering.metric]}: {verdict.word}"
    if verdict.difference:
        hint += f" ({number(verdict.difference)})"
    return {"css": _CLASSES[verdict.word], "sign": _SIGNS[verdict.word], "text": text, "hint": hint}


def _orderings(verdicts: Sequence[Verdict]) -> list[tuple[str, list[dict[str, str] | None]]]:
    """Each claim with a badge for each published metric, None for metrics that the paper does not compare."""
    rows = []
    for claimed in by_claim(verdicts):
        found = [claimed.get(metric) for metric in PUBLISHED]
        badges = [_badge(verdict, difference(verdict)) if verdict else None for verdict in found]
        rows.append((claim(next(iter(claimed.values())).ordering), badges))
    return rows


def _pictures(summary: Summary, ordered: Sequence[Row], folder: Path) -> dict[str, Any] | None:
    """The grid of samples with a row for each concept and a column for each method; None without pictures."""
    first: dict[tuple[str, str], Result] = {}
    for cell in sorted(summary.cells, key=lambda cell: cell.seed):
        first.setdefault((cell.concept, cell.method), cell)
    pictured = {method for (_, method), cell in first.items() if cell.picture}
    if not pictured:
        return None
    # First the photographs and the student before training, then the methods.
    references = [row for name in reversed(REFERENCES) for row in ordered if row.method == name]
    columns = [r for r in (*references, *(r for r in ordered if r not in references)) if r.method in pictured]
    return {
        "titles": [row.title for row in columns],
        "rows": [
            (concept, [_picture(first.get((concept, row.method)), folder) for row in columns])
            for concept in summary.concepts
        ],
    }


def _picture(cell: Result | None, folder: Path) -> dict[str, Any]:
    if cell is None:
        return {"notes": ["not run"], "uri": ""}
    notes = ["diverged"] if cell.diverged else []
    if not cell.picture:
        return {"notes": notes or ["no picture"], "uri": ""}
    try:
        uri = data_uri(open_picture(folder, cell.picture), "webp")
    except OSError:
        return {"notes": [*notes, "picture missing"], "uri": ""}
    return {"notes": notes, "uri": uri, "alt": f"{cell.title}: {cell.concept}, seed {cell.seed}"}
