"""What every verb returns: one object that prints, turns into data, and writes a page."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchnorm.harmless import harmless
from batchnorm.report.document import Document
from batchnorm.report.provenance import Provenance
from batchnorm.report.short import shortened

__all__ = ["Result", "finite_or_none", "record"]


_PROVENANCE = "_provenance"


class Result(ABC):
    """Base of the result of every verb.

    ``print(result)`` shows what matters in some lines, ``print(result.text(verbose=True))`` all of it, :meth:`to_dict`
    gives plain numbers and strings that ``json`` takes, and :meth:`to_html` writes one self-contained page. A notebook
    shows a result as tables.
    """

    @abstractmethod
    def document(self) -> Document:
        """Return what the report says, as data."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the result as numbers, strings, lists and dicts only."""

    @property
    def summary(self) -> str:
        """The result in one line."""
        return self.document().summary

    @property
    def provenance(self) -> Provenance:
        """Which function returned it, of which model, on which data, and when."""
        found = vars(self).get(_PROVENANCE)
        return found if isinstance(found, Provenance) else Provenance()

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file that needs nothing else, and return its path."""
        from batchnorm.report.html import (
            write_html,
        )  # Jinja is loaded only by those who ask for a page

        return write_html(replace(self.document(), provenance=self.provenance.rows()), path)

    def text(self, *, verbose: bool = False, width: int | None = None) -> str:
        """Return the report as text.

        Args:
            verbose: all of it; else what matters, in few lines where all is well.
            width: the longest line, in columns; by default the variable ``COLUMNS`` says, or the terminal, else 80.
        """
        from batchnorm.report.text import to_text

        document = self.document()
        return to_text(document if verbose else shortened(document, ".text(verbose=True)"), width)

    def __str__(self) -> str:
        """Return what matters of the report as text."""
        return self.text()

    def __repr__(self) -> str:
        """Return one line."""
        return f"<{type(self).__name__}: {harmless(self.summary)}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what matters, as tables."""
        from batchnorm.report.html import to_fragment

        return to_fragment(shortened(self.document(), ".text(verbose=True)"))


def record(result: Result, provenance: Provenance) -> None:
    """Have a result say where it comes from; some results are frozen dataclasses, of which that is no field."""
    vars(result)[_PROVENANCE] = provenance


def finite_or_none(value: float | None) -> float | None:
    """Return a number as JSON takes it: None where there is none, and for NaN and infinity.

    >>> finite_or_none(0.5), finite_or_none(float("nan"))
    (0.5, None)
    """
    return value if value is not None and math.isfinite(value) else None
