"""The report on a bench: `report.md` without pictures, and `report.html`, a single file with pictures and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from .page import render_page
from .summary import METRICS, PUBLISHED, VERDICTS, Row, Section, Summary, Verdict, by_claim, summarise
from .wording import (
    INTERVALS,
    SCALES,
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


def write_report(cells: Iterable[Mapping[str, Any]], header: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` for the given results into `folder`, and return both paths.

    cells: results of a bench, each with method, title, concept, seed, iterations, role, steps, diverged, seconds,
    metrics (by name, None where not measured) and picture (see `sheets.open_picture`, or none).
    header: facts on the run: "title", "command", "seeds", "machine", "date", "versions", "settings", and anything else.
    Raises InputError for a malformed cell and StorageError where a file cannot be written.
    """
    summary = summarise(cells, header)
    paths = folder / "report.md", folder / "report.html"
    write_text(paths[0], markdown(summary))
    write_text(paths[1], render_page(summary, folder, notes=(SCALES, INTERVALS)))
    return paths


def markdown(summary: Summary) -> str:
    """The report as Markdown, without pictures."""
    header = dict(summary.header)
    parts = [f"# {header.pop('title', 'The tables, measured')}", _header(header), SCALES, INTERVALS, _counts(summary)]
    for section in summary.sections:
        parts += [f"## {section.table.title}", section.table.question, _table(section)]
    parts += ["## The paper's orderings", _orderings(summary.verdicts)]
    parts += ["## Left out", *left_out(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(header: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {one_line(value)}" for key, value in header.items())


def _counts(summary: Summary) -> str:
    counts = {word: sum(v.word == word for v in summary.verdicts) for word in VERDICTS}
    return f"Of {len(summary.verdicts)} orderings: " + "; ".join(f"{word}: {n}" for word, n in counts.items()) + "."


def _table(section: Section) -> str:
    published = any(row.paper for row in section.rows)
    return _markdown_table([_cells(row, published) for row in section.rows])


def _cells(row: Row, published: bool) -> dict[str, str]:
    cells = {"method": row.title}
    for metric, name in METRICS.items():
        cells[name] = number(row.estimates.get(metric))
        if published and metric in PUBLISHED:
            figure = row.paper.value(metric) if row.paper else None
            cells[f"{name}, paper"] = "–" if figure is None else f"{figure:.3f}"
    cells["ordering"] = "; ".join(f"{METRICS[v.ordering.metric]}: {v.word}" for v in row.verdicts) or "–"
    cells["runs"] = str(row.cells) if row.cells else "–"
    cells["diverged"] = diverged(row)
    cells[SEEDS_APART] = seeds_apart(row)
    cells["iterations"] = iterations(row)
    cells["seconds"] = "–" if row.seconds is None else f"{row.seconds:.1f}"
    return cells


def _orderings(verdicts: Iterable[Verdict]) -> str:
    rows = []
    for claimed in by_claim(verdicts):
        row = {"the paper's claim": claim(next(iter(claimed.values())).ordering)}
        for metric in PUBLISHED:
            verdict = claimed.get(metric)
            row[METRICS[metric]] = _outcome(verdict)
        rows.append(row)
    return _markdown_table(rows)


def _outcome(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return verdict.word if verdict.difference is None else f"{difference(verdict)}, {verdict.word}"


def _markdown_table(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
