"""A document as one page that needs nothing else: no script, no network, no font of its own."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batchnorm.report.document import Block, Document, Plot, Table
from batchnorm.report.text import format_cell, is_numeric

__all__ = ["to_html", "write_html"]

_NO_PLOT = Markup('<p class="summary">The plot is missing: pip install &quot;batchnorm[demo]&quot; draws it.</p>')


def to_html(document: Document) -> str:
    """Return the document as a page. Plots are drawn where matplotlib is installed, else a sentence stands there."""
    environment = Environment(
        loader=PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = 0

    def draw(plot: Plot) -> Markup:
        nonlocal drawn
        if find_spec("matplotlib") is None:
            return _NO_PLOT
        from batchnorm.report.plots import to_svg

        drawn += 1
        return Markup(to_svg(plot, prefix=f"plot{drawn}-"))

    return environment.get_template("page.html.j2").render(
        document=document, kind_of=_kind, cell=format_cell, numeric=_numeric, draw=draw, version=version("batchnorm")
    )


def _kind(block: Block) -> str:
    return type(block).__name__


def _numeric(table: Table, column: int) -> bool:
    return is_numeric(row[column] for row in table.rows)


def write_html(document: Document, path: str | Path) -> Path:
    """Write the page, whole or not at all, and return its path; folders on the way are made.

    Raises:
        OSError: the file cannot be written there. What stood there before is still there.
    """
    path = Path(path)
    page = to_html(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    """Return the process's umask; mkstemp ignores it, and a report is no secret."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
