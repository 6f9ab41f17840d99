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

SECTIONS = ("What it finds", "What excludes it", "Evidence", "Cure")
"""The sections that every cause's docstring has, in this order."""


class Cause(ABC):
    """A reason why eval mode differs from training. Subclasses are the causes; the docstring of each is its page.

    Attributes:
        key: what ``finding.cause`` says.
        severity: how bad it is.
        excluded_at_home: statistics that fit the training batches exclude it: the data changed, not the model.
        excluded_by_freeze: a norm that the user froze is not blamed: its weights may have been trained with it.
        judged_by_metric: it is no fault where eval mode is as good as batch statistics by the metric.
        alone: where it is found nothing else is looked for.
    """

    key: ClassVar[str]
    severity: ClassVar[Severity] = "wrong"
    excluded_at_home: ClassVar[bool] = True
    excluded_by_freeze: ClassVar[bool] = True
    judged_by_metric: ClassVar[bool] = True
    alone: ClassVar[bool] = False

    def excluded(self, case: Case) -> frozenset[str]:
        """Return the names of the layers at which the evidence excludes this cause."""
        home = case.fitting_home if self.excluded_at_home else frozenset()
        return home | case.lived_with if self.excluded_by_freeze else home

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
