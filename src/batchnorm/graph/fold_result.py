"""What a fold did, norm by norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.graph.unfold import Pairs, unfold
from batchnorm.report import Document, Facts, Paragraph, Result, Section, Table

__all__ = ["FoldResult", "FoldedNorm", "LeftNorm"]


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that is gone.

    Attributes:
        norm: its qualified name; an identity stands there now.
        into: the module that absorbed it (several, separated by commas, if the norm followed several).
        kind: what that module computes: ``"convolution"``, ``"transposed convolution"`` or ``"linear"``.
    """

    norm: str
    into: str
    kind: str

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.norm} → {self.into}: folded."


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
class FoldResult(Result):
    """The folded model, and an account of every norm.

    Attributes:
        model: the folded model, of the original's class.
        folded: the norms that were absorbed, in order of execution.
        left: those that were not, each with its reason; norms that the example inputs do not reach come last.
        error: greatest absolute difference between the outputs of the two models on the example inputs.
        bound: what rounding allows there (see :mod:`batchnorm.graph.verify`).
        error_float64: the same difference when both compute in float64; None where the model does not run in float64,
            or nothing was folded.
        pairs: what the model had before, for :func:`batchnorm.unfold`; None if nothing was folded.
    """

    model: Module
    folded: Sequence[FoldedNorm]
    left: Sequence[LeftNorm]
    error: float
    bound: float
    error_float64: float | None = None
    pairs: Pairs | None = field(default=None, repr=False)

    def unfold(self) -> Module:
        """Return a copy of the model with the norms and parameters that it had, as :func:`batchnorm.unfold` does."""
        return self.model if self.pairs is None else unfold(self.model, self.pairs)

    def save_pairs(self, path: str | Path) -> Path:
        """Write what :func:`batchnorm.unfold` needs to a safetensors file, to be kept beside the folded weights.

        Raises:
            StateError: nothing was folded.
        """
        if self.pairs is None:
            raise StateError("FoldResult.save_pairs: nothing was folded, so there is nothing to take back.")
        return self.pairs.save(path)

    @property
    def summary(self) -> str:
        """The result in one line."""
        total = len(self.folded) + len(self.left)
        if not total:
            return "The model has no batch norm."
        became = sum(item.becomes is not None for item in self.left)
        count = f"{len(self.folded)} of {total} norms folded"
        count += f", {became} multiply-adds" if became else ""
        changed = self.folded or became
        return f"{count}; output error {self.error:.2g}, bound {self.bound:.2g}" if changed else count

    def document(self) -> Document:
        """Return the report as data."""
        sections = []
        if self.folded:
            facts = [("output error", self.error), ("bound", self.bound), ("error in float64", self.error_float64)]
            rows = [(f.norm, f.into, f.kind) for f in self.folded]
            sections.append(Section("Folded", [Facts(facts), Table(("norm", "into", "kind"), rows)]))
        kept = [(item.norm, item.into, item.reason) for item in self.left if item.becomes is None]
        became = [(item.norm, item.becomes, item.reason) for item in self.left if item.becomes is not None]
        if became:
            sections.append(Section("Left, in another form", [Table(("norm", "is now", "why"), became)]))
        if kept:
            sections.append(Section("Left as they are", [Table(("norm", "after", "why"), kept)]))
        if not sections:
            sections.append(Section("", [Paragraph("Nothing to do.")]))
        return Document(f"Fold {type(self.model).__name__}", self.summary, sections, "plain" if self.left else "good")

    def to_dict(self) -> dict[str, Any]:
        """Return the result as numbers, strings, lists and dicts."""
        return {
            "verb": "fold",
            "model": type(self.model).__name__,
            "folded": [asdict(item) for item in self.folded],
            "left": [asdict(item) for item in self.left],
            "error": self.error,
            "bound": self.bound,
            "error_float64": self.error_float64,
        }
