"""The report as one HTML page that needs nothing else: pictures and plots inside, no scripts, light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .paper import REFERENCES, TABLES
from .plots import against, group, intervals
from .style import document
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
_KEY = (("ours", "EchoDistill"), ("baseline", "baselines"), ("variant", "variants"), ("reference", "references"))


def render_page(summary: Summary, folder: Path, notes: Sequence[str] = ()) -> str:
    """The whole page as HTML text. folder: where the cells' pictures lie. notes: sentences on how to read it.

    A picture that is missing or cannot be read leaves its place empty, with a word that says so.
    """
    header = dict(summary.header)
    title = str(header.pop("title", "The tables, measured"))
    body = [
        f"<header><h1>{html.escape(title)}</h1>{_meta(header)}</header>",
        _tiles(summary),
        _section("Identity against prompt", _scatters(summary)),
        _section("Every concept, every method", _pictures(summary, folder)),
        *(_section(s.table.title, f"<p>{html.escape(s.table.question)}</p>{_table(s)}") for s in summary.sections),
        _section("The paper's orderings", _orderings(summary.verdicts)),
        _section("Every metric with its interval", _intervals(summary)),
        _section("How to read this", "".join(f"<p>{html.escape(note)}</p>" for note in notes)),
        _section("Left out", "".join(f"<p>{html.escape(line)}</p>" for line in left_out(summary))),
        _section("How it was measured", _facts(header)),
    ]
    return document(title, "\n".join(part for part in body if part))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def _meta(header: Mapping[str, Any]) -> str:
    facts = [one_line(header[key]) for key in ("date", "machine") if header.get(key)]
    return f'<p class="meta">{html.escape(" · ".join(facts))}</p>' if facts else ""


def _facts(header: Mapping[str, Any]) -> str:
    def value(key: str, found: Any) -> str:
        tag = "code" if key == "command" else "span"
        if isinstance(found, Mapping) and found:
            return "<br>".join(f"{html.escape(str(k))} {html.escape(one_line(v))}" for k, v in found.items())
        return f"<{tag}>{html.escape(one_line(found))}</{tag}>"

    rows = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{value(k, v)}</dd>" for k, v in header.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _tiles(summary: Summary) -> str:
    tiles = [
        (str(len(summary.concepts)), "concepts", ""),
        (str(len(summary.rows)), "methods", ""),
        (str(len(summary.cells)), "results", ""),
        (str(sum(cell.diverged for cell in summary.cells)), "of them diverged", ""),
    ]
    tiles += [
        (str(sum(v.word == word for v in summary.verdicts)), f"orderings: {word}", _CLASSES[word]) for word in VERDICTS
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile {css}"><b>{value}</b><span>{label}</span></div>' for value, label, css in tiles)
        + "</div>"
    )


def _scatters(summary: Summary) -> str:
    plots = [
        against(summary.rows, "clip_t", "dino", ("prompt (CLIP-T)", "identity (DINO)")),
        against(
            summary.rows, "context", "attributes", ("context accuracy", "attribute accuracy: is it that very object?")
        ),
    ]
    figures = "".join(f"<figure>{plot}</figure>" for plot in plots if plot)
    text = (
        "<p>All one-step methods. Whoever keeps the subject and follows the prompt at once stands in the upper right "
        "corner. Hollow marks are baselines at their best budget; crosses are 95 % intervals.</p>"
    )
    return f'{text}{_key()}<div class="plots large">{figures}</div>' if figures else ""


def _intervals(summary: Summary) -> str:
    rows = _ordered(summary)
    plots = [(name, intervals(rows, metric)) for metric, name in METRICS.items()]
    figures = "".join(f"<figure><figcaption>{name}</figcaption>{plot}</figure>" for name, plot in plots if plot)
    return f'{_key()}<div class="plots">{figures}</div>' if figures else ""


def _key() -> str:
    return (
        '<p class="key">'
        + "".join(f'<span class="{css}"><i></i>{html.escape(text)}</span>' for css, text in _KEY)
        + "</p>"
    )


def _ordered(summary: Summary) -> list[Row]:
    order = dict.fromkeys(method for table in TABLES for method in table.methods)
    return [summary.rows[m] for m in dict.fromkeys((*order, *summary.rows)) if m in summary.rows]


def _table(section: Section) -> str:
    published = any(row.paper for row in section.rows)
    heads = ['<th scope="col">method</th>']
    for metric, name in METRICS.items():
        heads.append(f'<th scope="col" class="n">{name}</th>')
        if published and metric in PUBLISHED:
            heads.append('<th scope="col" class="n p">paper</th>')
        if metric == PUBLISHED[-1]:
            heads.append('<th scope="col">the paper\'s ordering</th>')
    heads += [
        f'<th scope="col" class="n">{name}</th>' for name in ("runs", "diverged", SEEDS_APART, "iterations", "seconds")
    ]
    rows = "".join(_row(row, published) for row in section.rows)
    return _wide(f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{rows}</tbody></table>")


def _row(row: Row, published: bool) -> str:
    cells = [f'<th scope="row">{html.escape(row.title)}</th>']
    for metric in METRICS:
        estimate, alone = row.estimates.get(metric), row.spreads.get(metric)
        hint = f' title="all {alone.units} runs counted alone: {number(alone)}"' if alone else ""
        cells.append(f'<td class="n"{hint}>{number(estimate)}</td>')
        if published and metric in PUBLISHED:
            figure = row.paper.value(metric) if row.paper else None
            cells.append(f'<td class="n p">{"–" if figure is None else f"{figure:.3f}"}</td>')
        if metric == PUBLISHED[-1]:
            cells.append(f"<td>{' '.join(_badge(v, _direction(v, row)) for v in row.verdicts)}</td>")
    seconds = "–" if row.seconds is None else f"{row.seconds:.1f}"
    cells += [
        f'<td class="n">{v}</td>' for v in (row.cells or "–", diverged(row), seeds_apart(row), iterations(row), seconds)
    ]
    css = group(row.method) if row.cells else "absent"
    return f'<tr class="{css}">{"".join(cells)}</tr>'


def _direction(verdict: Verdict, row: Row) -> str:
    """The metric with an arrow: "DINO ↓" where the paper has this row below the method that it is compared with."""
    return f"{METRICS[verdict.ordering.metric]} {'↑' if verdict.ordering.better == row.method else '↓'}"


def _badge(verdict: Verdict, text: str) -> str:
    hint = f"{claim(verdict.ordering)} by {METRICS[verdict.ordering.metric]}: {verdict.word}"
    if verdict.difference:
        hint += f" ({number(verdict.difference)})"
    css, sign = _CLASSES[verdict.word], _SIGNS[verdict.word]
    return f'<span class="badge {css}" title="{html.escape(hint)}">{sign}&nbsp;{html.escape(text)}</span>'


def _orderings(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for claimed in by_claim(verdicts):
        text = html.escape(claim(next(iter(claimed.values())).ordering))
        cells = "".join(
            f"<td>{_badge(found, difference(found)) if (found := claimed.get(metric)) else ''}</td>"
            for metric in PUBLISHED
        )
        rows.append(f'<tr><th scope="row">{text}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{METRICS[metric]}</th>' for metric in PUBLISHED)
    table = f'<table><thead><tr><th scope="col">claim</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    signs = ", ".join(f"{sign} {word}" for word, sign in _SIGNS.items())
    return f"<p>Each figure is how far the first method lies above the second: {signs}.</p>{_wide(table)}"


def _pictures(summary: Summary, folder: Path) -> str:
    """Concepts down, methods across; in each place the first seed."""
    first: dict[tuple[str, str], Result] = {}
    for cell in sorted(summary.cells, key=lambda cell: cell.seed):
        first.setdefault((cell.concept, cell.method), cell)
    if not any(cell.picture for cell in first.values()):
        return ""
    ordered = _ordered(summary)
    # The truth first, then where training starts, then what each method makes of it.
    front = [row for name in reversed(REFERENCES) for row in ordered if row.method == name]
    columns = [
        row
        for row in [*front, *(r for r in ordered if r not in front)]
        if any(first[c, row.method].picture for c in summary.concepts if (c, row.method) in first)
    ]
    heads = "".join(f'<th scope="col">{html.escape(row.title)}</th>' for row in columns)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(concept)}</th>'
        + "".join(f"<td>{_picture(first.get((concept, row.method)), folder)}</td>" for row in columns)
        + "</tr>"
        for concept in summary.concepts
    )
    return "<p>The first training seed of each, whatever it shows. Scroll sideways for more methods.</p>" + _wide(
        f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>", "grid"
    )


def _picture(cell: Result | None, folder: Path) -> str:
    if cell is None:
        return '<span class="none">not run</span>'
    note = '<span class="none">diverged</span>' if cell.diverged else ""
    if not cell.picture:
        return note or '<span class="none">no picture</span>'
    try:
        uri = _data_uri(folder / cell.picture)
    except (OSError, UnidentifiedImageError):
        return note + '<span class="none">picture missing</span>'
    alt = html.escape(f"{cell.title}: {cell.concept}, seed {cell.seed}")
    return f'{note}<img src="{uri}" alt="{alt}" loading="lazy">'


def _data_uri(path: Path) -> str:
    """The picture as WebP in a data URI: a tenth of a PNG's size, which counts in a page with hundreds of them."""
    with Image.open(path) as picture:
        picture.load()
        if picture.format == "WEBP":
            content = path.read_bytes()
        else:
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, format="WEBP", quality=88)
            content = buffer.getvalue()
    return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")


def _wide(table: str, css: str = "") -> str:
    """A table that scrolls sideways where the window is too narrow; reachable with the keyboard."""
    return f'<div class="wide {css}" tabindex="0">{table}</div>'
