"""Tables of the report, in Markdown, made from rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from benchmarks.train_step.compare import LAYOUTS, WHOLE, WORKS, Rows, Speedup, shape_name
from benchmarks.train_step.competitors import COMPETITORS
from benchmarks.train_step.rows import Row

TITLES = {competitor.name: competitor.title for competitor in COMPETITORS}
_MISSING = "–"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers, aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def speedups(rows: Rows, ours: str, rivals: Sequence[str], phase: str) -> str:
    """Return a row for each work, layout and batch: mean and least speed-up over each rival, and time ÷ limit."""
    rows = rows.select(phase=phase)
    header = ["work, layout, batch"]
    for rival in rivals:
        header += [f"over {TITLES[rival]}", "least"]
    lines = []
    for work, layout, batch in _combinations(rows):
        some = rows.select(work=work, layout=layout, batch=batch)
        cells = [f"{WORKS[str(work)]}, {LAYOUTS[str(layout)]}, {batch}"]
        for rival in rivals:
            cells += _speedup(some.speedup(ours, rival))
        lines.append([*cells, _factor(some.over_limit(ours))])
    return markdown([*header, "time ÷ limit"], lines)


def near_limit(rows: Rows, competitors: Sequence[str], phase: str, least_bytes: float) -> str:
    """Return a row for each work and layout: time ÷ limit of large tensors, geometric mean and worst."""
    some = Rows(row for row in rows.select(phase=phase).all if _bytes(row) >= least_bytes)
    header = ["work, layout"]
    for name in competitors:
        header += [TITLES[name], "worst"]
    lines = []
    for work, layout in itertools.product(some.values("work"), some.values("layout")):
        cells = [f"{WORKS[str(work)]}, {LAYOUTS[str(layout)]}"]
        for name in competitors:
            here = some.select(work=work, layout=layout, competitor=name)
            worst = max((row["ratio"] for row in here.all if "ratio" in row), default=None)
            cells += [_factor(here.over_limit(name)), _factor(worst)]
        lines.append(cells)
    return markdown(header, lines)


def shapes(rows: Rows, work: object, layout: object, batch: object, phase: str) -> str:
    """Return a row for each shape: the limit, and the median of each competitor, in milliseconds."""
    some = rows.select(work=work, layout=layout, batch=batch, phase=phase)
    names = [str(name) for name in some.values("competitor")]
    lines = []
    for shape in some.values("shape_name"):
        here = {str(row["competitor"]): row for row in some.select(shape_name=shape).all}
        limit = next((row["limit"] for row in here.values() if "limit" in row), None)
        lines.append([str(shape), _milliseconds(limit), *(_milliseconds(_median(here.get(name))) for name in names)])
    return markdown(["C@H", "limit", *(TITLES[name] for name in names)], lines)


def every_shape(rows: Rows) -> list[tuple[str, str]]:
    """Return a heading and a table for each work, layout, batch and phase."""
    found = []
    for work, layout, batch in _combinations(rows):
        for phase in (WHOLE, "forward"):
            heading = f"{WORKS[str(work)]}, {LAYOUTS[str(layout)]}, batch {batch}, {phase.replace('+', ' + ')}"
            found.append((heading, shapes(rows, work, layout, batch, phase)))
    return found


def small(rows: Rows) -> str:
    """Return a row for each small shape: the median of each competitor, in microseconds."""
    some = rows.select(phase=WHOLE)
    names = [str(name) for name in some.values("competitor")]
    lines = []
    for shape in some.values("shape_name"):
        here = {str(row["competitor"]): row for row in some.select(shape_name=shape).all}
        times = [_median(here.get(name)) for name in names]
        lines.append([str(shape), *(_MISSING if time is None else f"{time * 1e6:.0f}" for time in times)])
    return markdown(["shape", *(TITLES[name] for name in names)], lines)


def networks(rows: Rows) -> str:
    """Return a row for each network, layout and competitor: the step in milliseconds, and how torch's compares."""
    lines = []
    for row in rows.all:
        rivals = rows.select(work=row["work"], layout=row["layout"], batch=row["shape"][0], competitor="torch").all
        faster = f"{rivals[0]['median'] / row['median']:.2f}" if rivals else _MISSING
        name = f"{row['work']}, {LAYOUTS[row['layout']]}, batch {row['shape'][0]}: {TITLES[row['competitor']]}"
        lines.append([name, row["backend"], f"{row['median'] * 1e3:.0f}", faster])
    return markdown(["network", "backend", "step, ms", "speed-up over torch"], lines)


def memory(rows: Rows) -> str:
    """Return a row for each shape and competitor: the two peaks, in MB and in activations."""
    lines = []
    for row in rows.all:
        size = row["activation_bytes"]
        shape = f"{row['shape'][0]}×{shape_name(row['shape'])}"
        name = f"{WORKS[row['work']]}, {shape}: {TITLES[row['competitor']]}"
        lines.append([name, *_peak(row["allocated_peak"], size), *_peak(row["resident_peak"], size)])
    return markdown(["layer", "allocated, MB", "in activations", "resident, MB", "in activations"], lines)


def _combinations(rows: Rows) -> list[tuple[object, object, object]]:
    """Return every (work, layout, batch) that there is, in an order for readers."""
    columns = itertools.product(rows.values("work"), rows.values("layout"), rows.values("batch"))
    return [(w, lay, b) for w, lay, b in columns if rows.select(work=w, layout=lay, batch=b).all]


def _speedup(found: Speedup | None) -> list[str]:
    if found is None:
        return [_MISSING, _MISSING]
    return [f"{found.mean:.2f}", f"{found.least:.2f} ({found.where})"]


def _factor(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.2f}"


def _bytes(row: Row) -> int:
    found: int = math.prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize
    return found


def _median(row: Row | None) -> float | None:
    return None if row is None else row["median"]


def _milliseconds(seconds: float | None) -> str:
    return _MISSING if seconds is None else f"{seconds * 1e3:.2f}"


def _peak(value: int | None, size: int) -> list[str]:
    return [_MISSING, _MISSING] if value is None else [f"{value / 1e6:.0f}", f"{value / size:.2f}"]
