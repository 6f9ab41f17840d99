"""A document in a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from batchnorm.harmless import harmless_data
from batchnorm.report.document import (
    Block,
    Cell,
    Diagrams,
    Document,
    Facts,
    HeatMap,
    Paragraph,
    Plot,
    Plots,
    Table,
)
from batchnorm.report.heatmap import shades

__all__ = ["format_cell", "is_numeric", "render", "to_text"]

_STYLE = {"plain": "", "good": "green", "bad": "red"}


def format_cell(cell: Cell) -> str:
    """Return a cell as a person reads it: 4 significant digits, yes/no, and a dash for nothing.

    >>> format_cell(0.123456), format_cell(1e-9), format_cell(True), format_cell(None)
    ('0.1235', '1e-09', 'yes', '–')
    """
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}" if math.isfinite(cell) else str(cell)
    return str(cell)


def is_numeric(cells: Iterable[Cell]) -> bool:
    """Return whether a column holds a number, so that it is set flush right."""
    return any(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)


def render(document: Document) -> RenderableType:
    """Return the document as a Rich renderable, in which no character and no markup of a name does anything."""
    document = harmless_data(document)
    parts: list[RenderableType] = [Text(document.title, style="bold")]
    if document.summary:
        parts.append(Text(document.summary, style=_STYLE[document.tone]))
    for section in document.sections:
        if section.brief is not None and not section.brief:
            continue
        if section.title:
            parts.append(Text(f"\n{section.title}", style="bold"))
        parts.extend(_block(block) for block in (section.blocks if section.brief is None else section.brief))
    return Group(*parts)


def _block(block: Block) -> RenderableType:
    if isinstance(block, Paragraph):
        return Text(block.text, style=_STYLE[block.tone])
    if isinstance(block, Facts):
        grid = RichTable.grid(padding=(0, 2))
        for name, value in block.items:
            grid.add_row(Text(name), Text(format_cell(value)))
        return grid
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Plot):
        return Text(f"[plot: {block.title}]", style="dim")
    if isinstance(block, Plots):
        return Group(*(_block(plot) for plot in block.plots))
    if isinstance(block, HeatMap):
        return _heat_map(block)
    if isinstance(block, Diagrams):
        return Text("\n".join(f"[picture: {diagram.title}]" for diagram in block.diagrams), style="dim")
    raise TypeError(f"no text for a block of type {type(block).__name__}")


_MOST_SHADES = 48


def _heat_map(block: HeatMap) -> RenderableType:
    """Return a row of shades for each row; the darkest is the limit."""
    grid = _titled(block, box=None)
    grid.add_column("")
    grid.add_column(Text(f"full shade: {format_cell(block.limit)} {block.unit}".rstrip()), no_wrap=True)
    for index, (name, values) in enumerate(block.rows):
        style = _STYLE[block.tones.get(index, "plain")]
        grid.add_row(Text(name, style=style), Text(shades(values, block.limit, _MOST_SHADES), style=style))
    return grid


def _titled(block: Table | HeatMap, **settings: Any) -> RichTable:
    # Text(), so that brackets in a name are not read as markup, nor words between colons as signs
    title = Text(block.title, style="table.title") if block.title else None
    caption = Text(block.caption, style="table.caption") if block.caption else None
    return RichTable(title=title, caption=caption, title_justify="left", **settings)


def _table(block: Table) -> RichTable:
    table = _titled(block)
    for index, column in enumerate(block.columns):
        numeric = is_numeric(row[index] for row in block.rows)
        table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for index, row in enumerate(block.rows):
        cells = [Text(format_cell(cell)) for cell in row]
        table.add_row(*cells, style=_STYLE[block.tones.get(index, "plain")])
    return table


def to_text(document: Document, width: int = 120) -> str:
    """Return the document as plain text of at most ``width`` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(render(document))
    out = console.file
    assert isinstance(out, io.StringIO)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
