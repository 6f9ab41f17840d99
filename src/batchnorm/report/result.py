"""What every verb returns: one object that prints, turns into data, and writes a page."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from batchnorm.report.document import Document

__all__ = ["Result", "finite_or_none"]


class Result(ABC):
    """Base of the result of every verb.

    ``print(result)`` shows a table, :meth:`to_dict` gives plain numbers and strings that ``json`` takes,
    and :meth:`to_html` writes one self-contained page.
    """

    @abstractmethod
    def document(self) -> Document:
        """Return what the report says, as data."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the result as numbers, strings, lists and dicts only."""

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file that needs nothing else, and return its path."""
        from batchnorm.report.html import (
            write_html,
        )  # Jinja is loaded only by those who ask for a page

        return write_html(self.document(), path)

    def __str__(self) -> str:
        """Return the report as text, tables drawn with lines."""
        from batchnorm.report.text import to_text

        return to_text(self.document())


def finite_or_none(value: float | None) -> float | None:
    """Return a number as JSON takes it: None where there is none, and for NaN and infinity.

    >>> finite_or_none(0.5), finite_or_none(float("nan"))
    (0.5, None)
    """
    return value if value is not None and math.isfinite(value) else None
