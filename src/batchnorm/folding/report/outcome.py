"""What a fold did: which norms were folded, which stay and why, how well the outputs agree, and what a pass saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from batchnorm.dataflow.threads import one_thread
from batchnorm.folding.proving.lost_range import LostRange
from batchnorm.folding.report.cost import Cost, Saving
from batchnorm.folding.report.int8_ranges import ChannelRanges, FoldedWeight
from batchnorm.report import Diagrams

__all__ = ["Costs", "FoldOutcome", "FoldedNorm", "LeftNorm", "Pictures"]


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that is gone.

    Attributes:
        norm: its qualified name; an identity stands there now.
        into: the module that absorbed it; several are separated by commas. Empty for the model itself.
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
        return f"{self.norm} → {self.into or 'the model itself'}: folded. {self.sentence}"


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


@dataclass(frozen=True, repr=False)
class FoldOutcome:
    """What became of every norm, and what was compared.

    Attributes:
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
        lost: folded weights of which channels lose range in their type (see
            :mod:`batchnorm.folding.proving.lost_range`).
        weights: folded weights of convolutions, transposed convolutions and linear layers, before and after.
        costs: what a pass took before and takes now, counted.
        pictures: what is around the norms that are folded, and around those that are left; alike ones once.
    """

    folded: Sequence[FoldedNorm]
    left: Sequence[LeftNorm]
    error: float
    bound: float
    error_float64: float | None
    on_random_inputs: bool | None
    sizes: Sequence[str]
    unseen: Sequence[str]
    lost: Sequence[LostRange]
    weights: Sequence[FoldedWeight]
    costs: Costs
    pictures: Pictures

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
