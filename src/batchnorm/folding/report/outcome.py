"""What is to be told of each norm: which were folded, which stay and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchnorm.folding.report.cost import Cost, Saving
from batchnorm.report import Diagrams

__all__ = ["Costs", "FoldedNorm", "Pictures"]


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that is gone.

    Attributes:
        norm: its qualified name; an identity stands there now.
        into: the module that absorbed it; several are separated by commas.
        kind: what they compute: ``"convolution"``, ``"transposed convolution"``, ``"linear"``, ``"embedding"`` or
            ``"norm"``.
        way: ``"back"`` to what runs before it, ``"on"`` to what runs after it, ``"both"``, cut in two, or ``"beside"``
            it, to what reads the same and is added to it.
        sentence: which part of it went where.
        crossed: the operators between it and those modules, each once.
        saving: what a pass is spared by that.
    """

    norm: str
    into: str
    kind: str
    way: Literal["back", "on", "both", "beside"]
    sentence: str
    crossed: tuple[str, ...]
    saving: Saving

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.norm} → {self.into}: folded. {self.sentence}"


@dataclass(frozen=True)
class Costs:
    """What a pass took before, and takes now."""

    before: Cost
    after: Cost


@dataclass(frozen=True)
class Pictures:
    """What is around the norms that are folded, before and after; and around those that are left."""

    folded: Diagrams
    left: Diagrams
