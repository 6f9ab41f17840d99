"""The short form of a document: what a screen and a notebook show first. The whole is for those who ask for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from batchnorm.report.document import Block, Diagrams, Document, HeatMap, Plot, Plots, Section, Table

__all__ = ["foremost", "shortened"]

_MOST_ROWS, _FIRST_ROWS, _GOOD_ROWS = 10, 5, 3


def shortened(document: Document, more: str) -> Document:
    """Return the document with the brief form of its sections, the rows that matter, and without pictures.

    Args:
        document: the whole.
        more: how the whole is shown: ``"--verbose"``.
    """
    sections = [replace(section, blocks=_short(section, more), brief=None) for section in document.sections]
    return replace(document, sections=[section for section in sections if section.blocks], more=more)


def foremost(sizes: Sequence[float], bad: Collection[int] = ()) -> list[int]:
    """Return the rows that a short table shows: the ten largest of the bad ones, or the three largest where none is.

    >>> foremost([0.1, 0.5, 0.2, 0.4]), foremost([0.1, 0.5, float("nan")], bad=[0, 2])
    ([1, 2, 3], [0, 2])
    """
    rows = sorted(bad or range(len(sizes)), key=lambda row: -sizes[row] if sizes[row] == sizes[row] else -math.inf)
    return sorted(rows[: _MOST_ROWS if bad else _GOOD_ROWS])


def _short(section: Section, more: str) -> list[Block]:
    blocks = section.blocks if section.brief is None else section.brief
    return [short for block in blocks if (short := _short_block(block, more)) is not None]


def _short_block(block: Block, more: str) -> Block | None:
    if isinstance(block, Table):
        return _short_table(block, more)
    if isinstance(block, HeatMap):
        return _short_map(block, more)
    return None if isinstance(block, Plot | Plots | Diagrams) else block


def _short_table(table: Table, more: str) -> Table:
    if len(table.rows) <= _MOST_ROWS:
        return table
    shown = _rows(table.shown, _bad(table), len(table.rows))
    tones = {place: table.tones[row] for place, row in enumerate(shown) if row in table.tones}
    rows = [table.rows[row] for row in shown]
    return replace(table, rows=rows, tones=tones, shown=None, rest=_rest(len(table.rows) - len(shown), more))


def _short_map(block: HeatMap, more: str) -> HeatMap | None:
    """Return the rows that are coloured: of those in which nothing is, dots would be all that a terminal shows."""
    shown = _bad(block)[:_MOST_ROWS]
    if not shown:
        return None
    rows = [block.rows[row] for row in shown]
    tones = {place: block.tones[row] for place, row in enumerate(shown)}
    return replace(block, rows=rows, tones=tones, rest=_rest(len(block.rows) - len(shown), more))


def _bad(block: Table | HeatMap) -> list[int]:
    return sorted(row for row, tone in block.tones.items() if tone == "bad")


def _rows(wanted: Sequence[int] | None, bad: Sequence[int], count: int) -> list[int]:
    if wanted is not None:
        return sorted(set(wanted))
    return list(bad[:_MOST_ROWS]) or list(range(min(_FIRST_ROWS, count)))


def _rest(count: int, more: str) -> str:
    return f"… and {count} more; {more} shows all." if count else ""
