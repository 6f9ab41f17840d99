r"""The proof of each fold: in float64, every value that should be what it was is compared with what it was.

The model is run in float64 as it is, and once more with what is folded. An operator that absorbed a norm from behind it
returns what the norm returned; one that absorbed a norm from before it returns what it returned before. All values that
no map has crossed are as they were. Float64 keeps 53 bits, so a value y may differ by

.. math:: 2^{-53} \cdot K \cdot M \qquad K = 2^{24}

with M the largest magnitude in y and, as large means may cancel, in what was read to compute it: a wrong fold errs by
about M, rounding by a small multiple of 2⁻⁵³ times the number of terms of a sum. Of a model that does not run in
float64 the values are compared in its own types, to half of their digits: √u · M, with u the unit roundoff.

Both runs are done on the example inputs, and on random ones of the same shapes if the model takes the same way on
those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.norms import is_norm
from batchnorm.dataflow.operator_kinds import family
from batchnorm.folding.planning.multiply_add import MultiplyAdd
from batchnorm.folding.planning.plan import FoldPlan, Step
from batchnorm.models.outputs import magnitude, scale_of
from batchnorm.travel.rules import location

__all__ = ["ValueProof"]


def _bound(dtype: torch.dtype) -> float:
    """Return the largest difference allowed, as a share of the largest magnitude."""
    return 2.0**-53 * 2**24 if dtype == torch.float64 else math.sqrt(torch.finfo(dtype).eps / 2)


@dataclass(eq=False)
class _Kept:
    """What an operator returned before."""

    tensor: Tensor
    magnitude: float
    norm: Step | MultiplyAdd


@dataclass(eq=False)
class ValueProof:
    """Two runs of a model, the second one folded by a plan: :meth:`record` and :meth:`compare` are their observers.

    Attributes:
        plan: what was done between the runs.
    """

    plan: FoldPlan
    # by the index of the call that returns it in the second run, and its place among the outputs
    _kept: dict[tuple[int, int], _Kept] = field(default_factory=dict)
    _position: int = 0
    _problems: dict[str, str] = field(default_factory=dict)
    _divergence: str = ""

    def __post_init__(self) -> None:
        gone = self.plan.gone
        self._calls = [call for call in self.plan.graph.calls if call not in gone]
        self._crossed = {value for step in self.plan.steps for value in step.crossed}
        self._watched = self._watch(gone)
        changed = self.plan.parameters.changed
        self._absorbers = {
            call.index: (step, absorber)
            for step in self.plan.steps
            for absorber in step.into
            if absorber.bias_name in changed
            for call in absorber.calls
        }

    def _watch(self, gone: set[Call]) -> dict[int, tuple[tuple[int, int], Step | MultiplyAdd]]:
        """Return which calls' outputs are kept in the first run: for which output of the second, and whose they are."""
        watched: dict[int, tuple[tuple[int, int], Step | MultiplyAdd]] = {}
        for step in self.plan.steps:
            for call in step.use.calls:
                value = call.args["input"]
                while value.producer is not None and value.producer in gone:
                    value = value.producer.args["input"]
                source = value.producer
                number = -1 if source is None else next((i for i, v in enumerate(source.outputs) if v is value), -1)
                if source is not None and number >= 0 and call.output not in self._crossed:
                    watched[call.index] = ((source.index, number), step)
            for call in step.sums:
                if call.output not in self._crossed:
                    watched.setdefault(call.index, ((call.index, 0), step))
            for absorber in step.into:
                for call in absorber.calls:
                    if call.output not in self._crossed and call not in gone:
                        watched.setdefault(call.index, ((call.index, 0), step))
        for item in self.plan.multiply_adds:
            for call in item.use.calls:
                if call.output not in self._crossed:
                    watched[call.index] = ((call.index, 0), item)
        return watched

    def record(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Look at one operator of the model as it is."""
        if call.index not in self._watched:
            return
        key, step = self._watched[call.index]
        tensor = next((leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), None)
        if tensor is not None and tensor.is_floating_point():
            read = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
            magnitude = max(scale_of(leaf) for leaf in [*read, tensor] if leaf.is_floating_point())
            self._kept[key] = _Kept(tensor.detach().clone(), magnitude, step)

    def compare(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Look at one operator of the folded model."""
        if self._divergence:
            return
        if call.module in self.plan.parameters.borders and linear_operator_of(call) is None:
            return  # it pads
        expected = self._calls[self._position] if self._position < len(self._calls) else None
        if (
            expected is None
            or _kind(expected) != _kind(call)
            or (is_norm(call) and not _is_state(call, "running_mean"))
        ):
            self._diverge_at(call, expected)
            return
        self._position += 1
        step, absorber = self._absorbers.get(expected.index, (None, None))
        if step is not None and absorber is not None and not _is_state(call, "bias", absorber.bias_name):
            self._problems[step.name] = f"The forward of {absorber.name} does not use its parameter {absorber.bias!r}."
        for number, tensor in enumerate(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            kept = self._kept.pop((expected.index, number), None)
            if kept is not None and not self._problems:
                self._require_same(call, kept, tensor)

    def _require_same(self, call: Call, kept: _Kept, tensor: Tensor) -> None:
        error = _error(kept.tensor, tensor)
        if not error <= _bound(kept.tensor.dtype) * max(kept.magnitude, scale_of(tensor)):
            self._problems[kept.norm.name] = (
                f"Folded, {location(call)} errs by {error:.3g}, more than float64 explains."
            )

    def _diverge_at(self, call: Call, expected: Call | None) -> None:
        """Note that the model does something else than before."""
        end = len(self.plan.graph.calls) if expected is None else expected.index
        if is_norm(call):  # of a module that is registered no more
            steps = [step for step in self.plan.steps if any(c.index < end for c in step.use.calls)]
            last = max(steps, key=lambda step: max(c.index for c in step.use.calls if c.index < end), default=None)
            if last is not None:
                self._problems[last.name] = "The model still calls the norm, by a reference of its own."
        self._divergence = f"Folded, the model takes another way at {location(call)}."

    def problems(self) -> dict[str, str]:
        """Return the norms that must stay, with the reason: the first in the order of execution, or all if unknown.

        Where there are multiply-adds, those first: without them it may be known.
        """
        if self._problems:
            return self._problems
        if not self._divergence and self._position < len(self._calls):
            self._divergence = "Folded, the model runs fewer operators than before."
        suspects = self.plan.multiply_adds or self.plan.steps
        return dict.fromkeys((suspect.name for suspect in suspects), self._divergence) if self._divergence else {}


def _kind(call: Call) -> str:
    """Return what an operator is called, in place or not; torch's module for ReLU6 calls it by its general name."""
    return {"relu6": "hardtanh"}.get(family(call), family(call))


def _is_state(call: Call, argument: str, name: str | None = None) -> bool:
    """Return whether an argument is a parameter or buffer of the model, of that name if one is given."""
    value = call.args.get(argument)
    return isinstance(value, Value) and bool(value.names) and (name is None or name in value.names)


def _error(old: Tensor, new: Tensor) -> float:
    """Return the largest difference where both are finite; infinity if one is and the other is not."""
    if old.shape != new.shape:
        return float("inf")
    if not old.numel():
        return 0.0
    error = magnitude(old - new)
    if math.isfinite(error):
        return error
    finite = torch.isfinite(old)
    if not torch.equal(finite, torch.isfinite(new)):
        return float("inf")
    return float(torch.where(finite, old - new, 0.0).abs().max())
