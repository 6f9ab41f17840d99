"""Operators that treat every element by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.operator_kinds import DROPOUTS, PASSING
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Demands, Knowledge, backward, forward, location

_PASSING = (*PASSING, "to", "_to_copy", "type_as", *DROPOUTS)
_HOMOGENEOUS = ("relu", "leaky_relu", "prelu")
"""f(s x) = s f(x) for s ≥ 0."""


def operand(call: Call) -> Value:
    """Return the first tensor that the operator reads."""
    value = call.args.get("self", call.args.get("input"))
    if not isinstance(value, Value):
        raise Refusal(f"{call.name} reads no tensor that the pass saw.")
    return value


def require_no_negative(call: Call, map_: Map) -> None:
    """Refuse a map that changes the order of numbers.

    Raises:
        Refusal: it has a negative scale somewhere.
    """
    negative = int((map_.scale < 0).sum())
    if negative:
        count = f"{negative} of {map_.scale.numel()} {'is' if negative == 1 else 'are'}"
        raise Refusal(f"No negative scale can cross {location(call)}, and {count} negative.")


@backward(*_PASSING)
def pass_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Cross an operator that is the identity."""
    _require_identity(call)
    return [(operand(call), wanted[0])]


@forward(*_PASSING)
def pass_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Cross an operator that is the identity."""
    _require_identity(call)
    return [given[operand(call)]]


def _require_identity(call: Call) -> None:
    in_effect = call.args.get("train", call.args.get("training", False))
    if call.name.rstrip("_") in DROPOUTS and in_effect and call.args["p"] != 0:
        raise Refusal(f"It reads the output of {location(call)}, which is on.")
    if operand(call).dtype != call.output.dtype:
        raise Refusal(f"{location(call)} changes the type of the numbers.")


@backward(*_HOMOGENEOUS)
def homogeneous_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Let a positive scale through."""
    _require_positive_scale(call, wanted[0])
    return [(operand(call), wanted[0])]


@forward(*_HOMOGENEOUS)
def homogeneous_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Let a positive scale through."""
    _require_positive_scale(call, given[operand(call)])
    return [given[operand(call)]]


def _require_positive_scale(call: Call, map_: Map) -> None:
    if not map_.only_scales:
        raise Refusal(f"No shift can cross {location(call)}, whose slope changes at zero.")
    require_no_negative(call, map_)


@backward("neg")
def neg_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Let −x become s(−x) + t, by x becoming s x − t."""
    return [(operand(call), Map(wanted[0].scale, -wanted[0].shift))]


@forward("neg")
def neg_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Return −(s x + t) = s(−x) − t."""
    map_ = given[operand(call)]
    return [Map(map_.scale, -map_.shift)]


@forward("abs")
def abs_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Return |s x| = |s| |x|."""
    map_ = given[operand(call)]
    if not map_.only_scales:
        raise Refusal(f"No shift can cross {location(call)}.")
    return [Map(map_.scale.abs(), map_.shift)]
