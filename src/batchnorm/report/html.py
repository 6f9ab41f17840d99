"""A document as one page that needs nothing else: no script, no network, no font of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.files.replace import replacing
from batchnorm.harmless import harmless_data
from batchnorm.report.cells import format_cell, is_numeric
from batchnorm.report.diagrams import inside, mark, to_svg
from batchnorm.report.document import Block, Cell, Document, Plot, Table
from batchnorm.report.heatmap import strip

__all__ = ["to_fragment", "to_html", "write_html"]

_MOST_ROWS = 24


def to_html(document: Document) -> str:
    """Return the document as a page.

    Plots are drawn where matplotlib is installed; without it their numbers are shown, and how to get the drawing.
    """
    return _filled(
        "page.html.j2",
        document,
        numbers=_numbers,
        draw=_drawing(),
        diagram=lambda block: Markup(to_svg(block)),
        inside=inside,
        mark=lambda role: Markup(mark(role)),
        strip=strip,
        scale=[i / 64 - 1 for i in range(129)],
        version=version("batchnorm"),
    )


def to_fragment(document: Document) -> str:
    """Return the document as a piece of a page, for notebooks: texts and tables, as compact as they can be.

    It has no pictures: give the short form, which has none (:mod:`batchnorm.report.short`).
    """
    return _filled("fragment.html.j2", document)


def _filled(template: str, document: Document, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        document=harmless_data(document), kind_of=_kind, cell=format_cell, numeric=_numeric, **more
    )


def _kind(block: Block) -> str:
    return type(block).__name__


def _drawing() -> Callable[[Plot], Markup | None]:
    """Return a function that draws the plots of one page one after the other, or gives None without matplotlib."""
    drawn = 0

    def draw(plot: Plot) -> Markup | None:
        nonlocal drawn
        if find_spec("matplotlib") is None:
            return None
        from batchnorm.report import plots

        drawn += 1
        return Markup(plots.to_svg(plot, prefix=f"plot{drawn}-"))

    return draw


_NUMBER_WITH_UNIT = re.compile(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?( \S+)?")


def _numeric(table: Table, column: int) -> bool:
    """Return whether a column is set flush right: numbers, also with a unit (97.6 %, 1.52 ×, 150 steps).

    Digits alone that come as text are no number but a name, of a layer called ``"0"`` for example.
    """
    cells = [row[column] for row in table.rows]
    if is_numeric(cells):
        return True
    texts = [cell for cell in cells if isinstance(cell, str)]
    return bool(texts) and all(_NUMBER_WITH_UNIT.fullmatch(text) and not text.isdigit() for text in texts)


def _numbers(plot: Plot) -> Table:
    """Return what a plot shows as a table: one row a point of the x axis, every n-th if there are many."""
    along: dict[Cell, list[Cell]] = {}
    for i, series in enumerate(plot.series):
        for x, y in zip(series.x, series.y, strict=True):
            along.setdefault(x, [None] * len(plot.series))[i] = float(y)
    step = -(-len(along) // _MOST_ROWS) if not any(isinstance(x, str) for x in along) else 1
    rows = [[x, *values] for x, values in along.items()]
    shown = rows[::step] + (rows[-1:] if (len(rows) - 1) % max(step, 1) else [])
    return Table([plot.x_label, *(series.name for series in plot.series)], shown)


def write_html(document: Document, path: str | Path) -> Path:
    """Write the page, whole or not at all, and return its path; folders on the way are made.

    Raises:
        OSError: the file cannot be written there. What stood there before is still there.
    """
    path = Path(path)
    page = to_html(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.write_text(page, encoding="utf-8")
    return path
