"""What is to be told of each norm: which were folded, which stay and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchnorm.dataflow.cost import Cost, Saving
from batchnorm.report import Diagrams

__all__ = ["Costs", "FoldedNorm", "LeftNorm", "Pictures"]


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
class LeftNorm:
    """A norm that is still there.

    Attributes:
        norm: its qualified name, or where it is called as a function.
        into: the module that could have absorbed it, None if no linear operator precedes it.
        reason: why it was left, as a sentence.
        becomes: what stands there now, with ``fuse=True``; None for the norm as it was.
    """

    norm: str
    into: str | None
    reason: str
    becomes: str | None = None

    def __str__(self) -> str:
        """Return it as a line."""
        arrow = f"{self.norm} → {self.into}" if self.into else self.norm
        return f"{arrow}: {f'left, as {self.becomes}' if self.becomes else 'not folded'}. {self.reason}"


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
