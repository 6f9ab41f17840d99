"""On which axis the features of each value lie, as far as a run can tell."""

from __future__ import annotations

from collections.abc import Mapping

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.operator_kinds import PASSING, family

__all__ = ["feature_axes", "moved_axis"]

_FEATURES_LAST = {"embedding", "gru", "lstm", "rnn_relu", "rnn_tanh"}
_TURNING = {"transpose", "swapaxes", "permute", "movedim", "moveaxis", "t", "flip"}


def moved_axis(call: Call, axis: int, rank: int) -> int | None:
    """Return where an operator that only rearranges axes puts ``axis``; None for any other operator."""
    name = family(call)
    if name in PASSING:
        return axis
    if name in ("transpose", "swapaxes"):
        pair = [d % rank for k, d in call.args.items() if isinstance(d, int) and k != "self"]
        return {pair[0]: pair[1], pair[1]: pair[0]}.get(axis, axis)
    if name == "permute":
        return [d % rank for d in call.args["dims"]].index(axis)
    return None


def feature_axes(graph: Graph) -> Mapping[Value, int]:
    """Return the axis of the features of every value of which it is known.

    Convolutions have them on axis 1, embeddings and recurrent layers on the last one. A linear layer has them on the
    last axis if its input has, or is the model's input; behind a convolution it works along positions. Operators that
    keep the shape keep the axis.
    """
    axes: dict[Value, int] = {}
    untouched = set(graph.inputs)  # the model's inputs, and what was computed of them entry by entry
    for call in graph.calls:
        for value in call.outputs[:1]:
            axis = _axis_after(call, value, axes, untouched)
            if axis is not None:
                axes[value] = axis
            elif _same_shape(call, value, untouched) and family(call) not in _TURNING:
                untouched.add(value)
    return axes


def _axis_after(call: Call, value: Value, axes: Mapping[Value, int], untouched: set[Value]) -> int | None:
    name, rank = family(call), len(value.shape)
    if name in _FEATURES_LAST:
        return rank - 1
    operator = linear_operator_of(call)
    if operator is not None and operator.trailing:
        return operator.channel_axis(rank)
    first = next(call.tensor_args(), None)
    if first is None:
        return None
    if operator is not None:
        return rank - 1 if first in untouched else axes.get(first)
    if first in axes and name in _TURNING | PASSING:
        return moved_axis(call, axes[first], len(first.shape))
    known = _same_shape(call, value, axes)
    return None if known is None else axes[known]


def _same_shape(call: Call, value: Value, among: Mapping[Value, int] | set[Value]) -> Value | None:
    """Return the first tensor that the call reads, is in ``among``, and has the shape of ``value``."""
    return next((read for read in call.tensor_args() if read in among and read.shape == value.shape), None)
