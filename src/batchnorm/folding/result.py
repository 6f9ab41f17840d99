"""What a fold did, norm by norm."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from batchnorm.errors import StateError
from batchnorm.folding.report.latency import Measured, measure
from batchnorm.folding.report.outcome import FoldOutcome
from batchnorm.folding.report.sections import sections
from batchnorm.folding.unfold import unfold
from batchnorm.folding.writing.record import FoldRecord
from batchnorm.models.program_inputs import own_inputs
from batchnorm.report import Document, Result
from batchnorm.report.result import record

__all__ = ["FoldResult"]


@dataclass(frozen=True, repr=False)
class FoldResult(FoldOutcome, Result):
    """The folded model, and what became of every norm: all of :class:`batchnorm.folding.report.outcome.FoldOutcome`.

    Attributes:
        model: the folded model, of the original's class; a program for a program.
        pairs: what the model had before, for :func:`batchnorm.unfold`; None if nothing was folded, or for a program.
        original: the program that was folded; None for a module.
        measured: latency and memory before and now, in the result of :meth:`measure`.
    """

    model: Any
    pairs: FoldRecord | None
    original: Any = None
    measured: Measured | None = None

    @classmethod
    def of(cls, outcome: FoldOutcome, **own: Any) -> FoldResult:
        """Return the result of a fold that did this, with what is its own, or differs."""
        return cls(**{item.name: getattr(outcome, item.name) for item in fields(FoldOutcome)} | own)

    def unfold(self) -> Any:
        """Return a copy of the model with the norms and parameters that it had, as :func:`batchnorm.unfold` does.

        For a program it is the original itself.
        """
        if self.original is not None:
            return self.original
        return self.model if self.pairs is None else unfold(self.model, self.pairs)

    def save_pairs(self, path: str | Path) -> Path:
        """Write what :func:`batchnorm.unfold` needs to a safetensors file, to be kept beside the folded weights.

        Raises:
            StateError: nothing was folded, or a program was.
        """
        if self.original is not None:
            raise StateError("FoldResult.save_pairs: a folded program has no pairs. Keep the original program.")
        if self.pairs is None:
            raise StateError("FoldResult.save_pairs: nothing was folded, so there is nothing to take back.")
        return self.pairs.save(path)

    def measure(self, example_inputs: Any = None, *, seconds: float = 2.0) -> FoldResult:
        """Return the result with latency and memory of a pass, of the model as it was and of the folded one, in turn.

        The model as it was is what :meth:`unfold` returns. See :func:`batchnorm.folding.report.latency.measure` for
        what is measured, and how.

        Args:
            example_inputs: on which to measure: a tensor, a tuple of positional or a dict of keyword arguments. An
                exported program has its own.
            seconds: how long, roughly.

        Raises:
            StateError: nothing was folded, so there is nothing to compare.
            InputError: a model fails on the inputs.
        """
        if not self.changed:
            raise StateError("FoldResult.measure: nothing was folded, so the model is as fast as it was.")
        inputs = own_inputs(self.original) if example_inputs is None else example_inputs
        before, after = (_runnable(model) for model in (self.unfold(), self.model))
        measured = measure(before, after, inputs, seconds=seconds)
        result = FoldResult.of(self, model=self.model, pairs=self.pairs, original=self.original, measured=measured)
        record(result, self.provenance)
        return result

    @property
    def summary(self) -> str:
        """The result in one line."""
        total = len(self.folded) + len(self.left)
        if not total:
            return "The model has no batch norm."
        became = sum(item.becomes is not None for item in self.left)
        count = f"{len(self.folded)} of {total} norms folded"
        count += f", {became} made multiply-adds" if became else ""
        return f"{count}; output error {self.error:.2g}, bound {self.bound:.2g}" if self.changed else count

    def document(self) -> Document:
        """Return the report as data."""
        content = sections(self, self.model, self.measured)
        return Document(f"Fold {type(self.model).__name__}", self.summary, content, "plain" if self.left else "good")

    def to_dict(self) -> dict[str, Any]:
        """Return the result as numbers, strings, lists and dicts."""
        return {
            "verb": "fold",
            "model": type(self.model).__name__,
            "folded": [{**asdict(item), "crossed": list(item.crossed)} for item in self.folded],
            "left": [asdict(item) for item in self.left],
            "error": self.error,
            "bound": self.bound,
            "error_float64": self.error_float64,
            "on_random_inputs": self.on_random_inputs,
            "sizes": list(self.sizes),
            "warnings": self.warnings,
            "lost": [asdict(item) for item in self.lost],
            "ranges": [item.to_dict() for item in self.ranges],
            "costs": asdict(self.costs),
            "measured": None if self.measured is None else asdict(self.measured),
        }


def _runnable(model: Any) -> Any:
    return model.module() if isinstance(model, ExportedProgram) else model
