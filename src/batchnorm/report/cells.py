"""Cells of a table, and other values, as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from batchnorm.report.document import Cell

__all__ = ["end_of_name", "format_cell", "is_numeric"]


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


def end_of_name(name: str, most: int) -> str:
    """Return a module's name or, where it is long, its last parts: those tell modules apart.

    >>> end_of_name("layer1.0.bn1", 24), end_of_name("backbone.layer3.12.conv_block.bn2", 24)
    ('layer1.0.bn1', '….12.conv_block.bn2')
    """
    if len(name) <= most:
        return name
    end = name[1 - most :]
    return "…" + end[max(end.find("."), 0) :]
