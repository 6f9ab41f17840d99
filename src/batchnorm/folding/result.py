"""What a fold did, norm by norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from batchnorm.dataflow.threads import one_thread
from batchnorm.errors import StateError
from batchnorm.folding.planning.outcome import LeftNorm
from batchnorm.folding.proving.lost_range import LostRange
from batchnorm.folding.report.int8_ranges import ChannelRanges, FoldedWeight
from batchnorm.folding.report.latency import Measured, measure
from batchnorm.folding.report.outcome import Costs, FoldedNorm, Pictures
from batchnorm.folding.report.sections import sections
from batchnorm.folding.unfold import unfold
from batchnorm.folding.writing.record import Pairs
from batchnorm.models.program_inputs import own_inputs
from batchnorm.report import Document, Result
from batchnorm.report.result import record

__all__ = ["FoldResult"]


@dataclass(frozen=True, repr=False)
class FoldResult(Result):
    """The folded model, and an account of every norm.

    Attributes:
        model: the folded model, of the original's class; a program for a program.
        folded: the norms that were absorbed, in order of execution.
        left: those that were not, each with its reason; norms that the example inputs do not reach come last.
        error: greatest absolute difference between the outputs of the two models on the example inputs.
        bound: what rounding allows there (see :mod:`batchnorm.verification.end_to_end`).
        error_float64: the same difference when both compute in float64; None where the model does not run in float64,
            or nothing was folded.
        on_random_inputs: whether every value was compared on random inputs of the example's shape as well as on the
            example's; not where the model fails on those. None if nothing was changed.
        sizes: on what else every value was compared, as phrases: inputs of other sizes and values, other numbers.
        unseen: what no run has shown, as sentences: sizes at which the model does not run, code that was not reached.
        pairs: what the model had before, for :func:`batchnorm.unfold`; None if nothing was folded, or for a program.
        original: the program that was folded; None for a module.
        lost: folded weights of which channels lose range in their type (see
            :mod:`batchnorm.folding.proving.lost_range`).
        weights: folded weights of convolutions, transposed convolutions and linear layers, before and after.
        costs: what a pass took before and takes now, counted.
        pictures: what is around the norms that are folded, and around those that are left; alike ones once.
        measured: latency and memory before and now, after :meth:`measure`.
    """

    model: Any
    folded: Sequence[FoldedNorm]
    left: Sequence[LeftNorm]
    error: float
    bound: float
    error_float64: float | None = None
    on_random_inputs: bool | None = None
    pairs: Pairs | None = None
    original: Any = None
    sizes: Sequence[str] = ()
    unseen: Sequence[str] = ()
    lost: Sequence[LostRange] = ()
    weights: Sequence[FoldedWeight] = ()
    costs: Costs | None = None
    pictures: Pictures | None = None
    measured: Measured | None = None

    @property
    def warnings(self) -> list[str]:
        """What was folded and may not please, in sentences: weights that lose range, and what no run has shown."""
        return [*(str(item) for item in self.lost), *self.unseen]

    @cached_property
    def ranges(self) -> list[ChannelRanges]:
        """The ranges of the channels of each folded weight, and what int8 makes of them.

        See :mod:`batchnorm.folding.report.int8_ranges`. They are measured when they are first read: do so before the
        folded model is trained.
        """
        with one_thread():
            return [weight.ranges() for weight in self.weights]

    @property
    def changed(self) -> bool:
        """Whether the model is another one than it was."""
        return bool(self.folded) or any(item.becomes is not None for item in self.left)

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
        measured = replace(self, measured=measure(before, after, inputs, seconds=seconds))
        record(measured, self.provenance)
        return measured

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
        return Document(
            f"Fold {type(self.model).__name__}", self.summary, sections(self), "plain" if self.left else "good"
        )

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
            "costs": None if self.costs is None else asdict(self.costs),
            "measured": None if self.measured is None else asdict(self.measured),
        }


def _runnable(model: Any) -> Any:
    return model.module() if isinstance(model, ExportedProgram) else model
