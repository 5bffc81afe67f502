"""Aggregation of a bench's results for the report: rows with intervals, verdicts on orderings, missing methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..messages import quoted
from .methods import method_title, report_tables
from .paper import REFERENCES, TRIALS, Figure, Ordering, Table, figure_of, orderings
from .statistics import Estimate, between_seeds, over_cells, over_concepts, paired_difference

METRICS = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I",
    "dino": "DINO",
    "attributes": "attributes",
    "context": "context",
    "diversity": "diversity",
}
PUBLISHED = ("clip_t", "clip_i", "dino")  # those that the paper has too
AGREES, WITHIN, FAILS, UNKNOWN = "agrees", "agrees, within the interval", "does not hold", "not measured"
VERDICTS = (AGREES, WITHIN, FAILS, UNKNOWN)
_KEYS = ("method", "title", "concept", "seed", "iterations", "role", "steps", "diverged", "seconds", "metrics")


@dataclass(frozen=True)
class Result:
    """One method on one concept with one training seed.

    metrics: by name, only those that were measured and are finite. seconds: of training. picture: address in the
    bench's folder (see `sheets.open_picture`), "" for none.
    """

    method: str
    title: str
    concept: str
    seed: int
    iterations: int
    role: str
    steps: int
    diverged: bool
    seconds: float | None
    metrics: dict[str, float]
    picture: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether an ordering of the paper holds here.

    difference: better minus worse over common cells, None if there are none. word: one of VERDICTS.
    """

    ordering: Ordering
    difference: Estimate | None
    word: str


@dataclass(frozen=True)
class Row:
    """One method of a table.

    estimates: by metric, over concepts; spreads: by metric, over cells. Both leave out diverged runs and metrics that
    no cell has. seeds_apart: `statistics.between_seeds` of DINO. cells: number of runs, including diverged ones.
    seconds: mean training time. one_step: whether a student samples in one step.
    """

    method: str
    title: str
    cells: int
    diverged: int
    iterations: tuple[int, ...]
    seconds: float | None
    one_step: bool
    estimates: dict[str, Estimate]
    spreads: dict[str, Estimate]
    seeds_apart: float | None
    paper: Figure | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Section:
    """A table with its measured rows and the rows of methods that only the paper measured."""

    table: Table
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Summary:
    """The content of a report. header: facts on the run. left_out: ids of methods without results.

    gaps: measured methods that lack some of the bench's cells, with the number of their cells and of all cells.
    """

    header: dict[str, Any]
    cells: tuple[Result, ...]
    rows: dict[str, Row]
    sections: tuple[Section, ...]
    verdicts: tuple[Verdict, ...]
    left_out: tuple[str, ...]
    gaps: dict[str, tuple[int, int]]

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts of the bench, in order of appearance."""
        return tuple(dict.fromkeys(cell.concept for cell in self.cells))


def summarise(cells: Iterable[Mapping[str, Any]], header: Mapping[str, Any]) -> Summary:
    """Summarise the results of a bench, which may be incomplete.

    Raises InputError for a cell without a needed key or with a metric that is no number, and for two cells of the
    same method, concept and seed.
    """
    parsed = [_result(index, cell) for index, cell in enumerate(cells)]
    by_method: dict[str, list[Result]] = {}
    seen: set[tuple[str, str, int]] = set()
    for cell in parsed:
        identity = (cell.method, cell.concept, cell.seed)
        if identity in seen:
            raise InputError(
                f"the bench has two results for method '{cell.method}', concept '{cell.concept}', seed {cell.seed}; "
                "remove one of them."
            )
        seen.add(identity)
        by_method.setdefault(cell.method, []).append(cell)
    verdicts = tuple(_judge(ordering, by_method) for ordering in orderings())
    rows = {method: _row(method, of_method, verdicts) for method, of_method in by_method.items()}
    tables = [*report_tables()]
    known = {method for table in tables for method in table.methods}
    if others := tuple(method for method in by_method if method not in known):
        tables.append(Table("other", "Also measured", "Methods that are in none of the tables above.", others))
    whole = len({(cell.concept, cell.seed) for cell in parsed})
    return Summary(
        header=dict(header),
        cells=tuple(parsed),
        rows=rows,
        sections=_sections(tables, rows),
        verdicts=verdicts,
        left_out=tuple(m for m in _in_order() if m not in by_method and _ours_to_measure(m)),
        # References need no training seeds, so they have fewer cells by design.
        gaps={m: (len(c), whole) for m, c in by_method.items() if len(c) < whole and m not in REFERENCES},
    )


def judge(difference: Estimate | None, strict: bool = True) -> str:
    """The verdict on an ordering from better minus worse: one of VERDICTS.

    It agrees where the 95 % interval of the difference lies above 0, agrees within the interval where only the mean
    does, and does not hold otherwise. Without `strict` a mean of exactly 0 agrees within the interval too.
    """
    if difference is None:
        return UNKNOWN
    if difference.low > 0:
        return AGREES
    return WITHIN if difference.mean > 0 or (not strict and difference.mean == 0) else FAILS


def by_claim(verdicts: Iterable[Verdict]) -> list[dict[str, Verdict]]:
    """The verdicts by metric, for each pair of methods that the paper compares, in the paper's order."""
    claims: dict[tuple[str, str], dict[str, Verdict]] = {}
    for verdict in verdicts:
        claims.setdefault((verdict.ordering.better, verdict.ordering.worse), {})[verdict.ordering.metric] = verdict
    return list(claims.values())


def values(cells: Sequence[Result], metric: str) -> dict[tuple[str, int], float]:
    """The metric of one method's cells by concept and seed, without diverged runs."""
    return {(c.concept, c.seed): c.metrics[metric] for c in cells if metric in c.metrics and not c.diverged}


def _judge(ordering: Ordering, by_method: Mapping[str, list[Result]]) -> Verdict:
    better, worse = (values(by_method.get(m, []), ordering.metric) for m in (ordering.better, ordering.worse))
    difference = paired_difference(better, worse)
    return Verdict(ordering, difference, judge(difference, ordering.strict))


def _row(method: str, cells: list[Result], verdicts: Iterable[Verdict]) -> Row:
    measured = {name: found for name in METRICS if (found := values(cells, name))}
    seconds = [cell.seconds for cell in cells if cell.seconds is not None]
    title = method_title(method)
    return Row(
        method,
        cells[0].title if title == method else title,
        cells=len(cells),
        diverged=sum(cell.diverged for cell in cells),
        iterations=tuple(sorted({cell.iterations or 0 for cell in cells})),
        seconds=sum(seconds) / len(seconds) if seconds else None,
        one_step=all(cell.role == "student" and cell.steps == 1 for cell in cells),
        estimates={name: e for name, found in measured.items() if (e := over_concepts(found))},
        spreads={name: e for name, found in measured.items() if (e := over_cells(found))},
        seeds_apart=between_seeds(measured.get("dino", {})),
        paper=figure_of(method),
        verdicts=tuple(v for v in verdicts if v.ordering.row == method),
    )


def _sections(tables: Iterable[Table], rows: Mapping[str, Row]) -> tuple[Section, ...]:
    """The tables with at least one measured method that no earlier table has."""
    sections, shown_before = [], set[str]()
    for table in tables:
        measured = {method for method in table.methods if method in rows}
        if measured - shown_before:
            shown = [m for m in table.methods if m in rows or not _ours_to_measure(m)]
            sections.append(Section(table, tuple(rows.get(m) or _unmeasured(m) for m in shown)))
        shown_before |= measured
    return tuple(sections)


def _unmeasured(method: str) -> Row:
    return Row(method, method_title(method), 0, 0, (), None, False, {}, {}, None, figure_of(method), ())


def _ours_to_measure(method: str) -> bool:
    figure = figure_of(method)
    return figure is None or figure.measured_here


def _in_order() -> list[str]:
    return list(
        dict.fromkeys(method for table in report_tables() if table.key != TRIALS.key for method in table.methods)
    )


def _result(index: int, cell: Mapping[str, Any]) -> Result:
    if missing := [key for key in _KEYS if key not in cell]:
        raise InputError(f"result {index} of the bench lacks {', '.join(missing)}; remove it and run the bench again.")
    metrics: dict[str, float] = {}
    for name, value in (cell["metrics"] or {}).items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(
                f"result {index} of the bench ({cell['method']}, {cell['concept']}, seed {cell['seed']}) has "
                f"{name} = {quoted(value)}; expected a number or null."
            )
        if math.isfinite(value):
            metrics[name] = float(value)
    return Result(
        **{key: cell[key] for key in _KEYS if key != "metrics"}, metrics=metrics, picture=cell.get("picture") or ""
    )
