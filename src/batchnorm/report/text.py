"""A document in a terminal."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from batchnorm.harmless import harmless_data
from batchnorm.report.cells import format_cell
from batchnorm.report.document import (
    Block,
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
from batchnorm.report.tables import STYLE, caption, fitted, pairs

__all__ = ["render", "to_text", "usual_width"]

_USUAL, _NARROWEST = 80, 20


def usual_width() -> int:
    """Return how wide a text is of which nobody says it: as ``COLUMNS`` says, as the terminal is, else 80."""
    return max(shutil.get_terminal_size((_USUAL, 24)).columns, _NARROWEST)


def render(document: Document) -> RenderableType:
    """Return the document as a Rich renderable, in which no character and no markup of a name does anything.

    Pictures have no text: those who want them ask for a page.
    """
    document = harmless_data(document)
    parts: list[RenderableType] = [Text(document.title, style="bold")]
    if document.summary:
        parts.append(Text(document.summary, style=STYLE[document.tone]))
    for section in document.sections:
        blocks = [block for block in section.blocks if not isinstance(block, Plot | Plots | Diagrams)]
        if blocks and section.title:
            parts.append(Text(f"\n{section.title}", style="bold"))
        parts.extend(_block(block, document.more) for block in blocks)
    return Group(*parts)


class _ByWidth:
    """What is laid out when it is known how wide it may be."""

    def __init__(self, layout: Callable[[int], RenderableType]) -> None:
        self._layout = layout

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._layout(options.max_width)


def _block(block: Block, more: str) -> RenderableType:
    if isinstance(block, Paragraph):
        return Text(block.text, style=STYLE[block.tone])
    if isinstance(block, Facts):
        items = [(name, format_cell(value)) for name, value in block.items]
        return _ByWidth(lambda room: pairs(items, room))
    if isinstance(block, Table):
        return _ByWidth(lambda room: fitted(block, room, more))
    if isinstance(block, HeatMap):
        return _ByWidth(lambda room: _heat_map(block, room))
    raise TypeError(f"no text for a block of type {type(block).__name__}")


_MOST_SHADES, _FEWEST_SHADES = 48, 8


def _heat_map(block: HeatMap, room: int) -> RenderableType:
    """Return a row of shades for each row; the darkest is the limit."""
    grid = RichTable.grid(padding=(0, 2, 0, 0), pad_edge=False)
    names = max((Text(name).cell_len for name, _ in block.rows), default=0)
    wide = max(min(_MOST_SHADES, room - names - 2), _FEWEST_SHADES)
    for index, (name, values) in enumerate(block.rows):
        style = STYLE[block.tones.get(index, "plain")]
        grid.add_row(Text(name, style=style), Text(shades(values, block.limit, wide), style=style))
    title = f"{block.title} (full shade: {format_cell(block.limit)} {block.unit}".rstrip() + ")"
    rest = [Text(block.rest)] if block.rest else []
    return Group(Text(title, style="italic"), grid, *rest, *caption(block.caption))


def to_text(document: Document, width: int | None = None) -> str:
    """Return the document as plain text of at most ``width`` columns: :func:`usual_width` by default."""
    room = usual_width() if width is None else width
    console = Console(file=io.StringIO(), width=room, color_system=None, legacy_windows=False)
    console.print(render(document))
    out = console.file
    assert isinstance(out, io.StringIO)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
