"""What a cause is: one class in one file, whose docstring is its page."""

from __future__ import annotations

import inspect
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.diagnosis.case import Case, Severity, Suspicion
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["SECTIONS", "Cause", "listing", "module_line", "names_of", "span"]

SECTIONS = ("What it finds", "Evidence", "Cure")
"""The sections that every cause's docstring has, in this order."""


class Cause(ABC):
    """A reason why eval mode differs from training. Subclasses are the causes; the docstring of each is its page.

    Attributes:
        key: what ``finding.cause`` says.
        severity: how bad it is.
    """

    key: ClassVar[str]
    severity: ClassVar[Severity] = "wrong"

    @abstractmethod
    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield what speaks for this cause; layers whose gap it explains go into ``case.explained``."""

    @classmethod
    def page(cls) -> str:
        """Return the docstring, unindented."""
        return inspect.cleandoc(cls.__doc__ or "")

    @classmethod
    def sections(cls) -> dict[str, str]:
        """Return the sections of the docstring by their headings, unindented."""
        parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", cls.page(), flags=re.MULTILINE)
        return {heading: textwrap.dedent(text).strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def names_of(layers: Iterable[LayerGap]) -> list[str]:
    """Return the names of layers."""
    return [layer.name for layer in layers]


def listing(items: Sequence[object], limit: int = 4) -> str:
    """Return the first few items in a row.

    >>> listing([1, 2, 3, 4, 5, 6])
    '1, 2, 3, 4, …'
    """
    return ", ".join(str(item) for item in items[:limit]) + (", …" if len(items) > limit else "")


def span(values: Tensor) -> str:
    """Return the range of some numbers.

    >>> span(torch.tensor([0.5, 2.0]))
    '0.5 to 2'
    """
    finite = values[torch.isfinite(values)]
    if not finite.numel():
        return "nothing finite"
    low, high = f"{float(finite.min()):.3g}", f"{float(finite.max()):.3g}"
    return low if low == high else f"{low} to {high}"


def module_line(name: str) -> str:
    """Return the code that gets a module by its name; the model itself is ``""``."""
    return f"model.get_submodule({name!r})" if name else "model"
