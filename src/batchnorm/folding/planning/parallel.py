r"""A norm beside a linear operator: both read x, and what they return meets in a sum.

With the norm gone, an identity stands in its place. The operator takes in what is missing then,

.. math:: s x + t = x + \big((s - 1)\,x + t\big)

in the tap of its kernel that reads, of x, the very element that it computes: s − 1 there, t in the bias. That tap never
reads what is padded with, so that zeros at the border are none of its business. Between each of the two and the sum
there may be factors of the channels: numbers, parameters, norms that stay. With f that of the norm's way and g that of
the operator's, f/g of it all is taken in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.absorbers.norm import Norm
from batchnorm.absorbers.table import absorber_of, linear_operator_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.norms import NormUse
from batchnorm.dataflow.operator_kinds import DROPOUTS, PASSING, family
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.shared_memory import norm_input
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import location, number

__all__ = ["Beside", "find_beside"]

IsGone = Callable[[Call], bool]


@dataclass(frozen=True, eq=False)
class Beside:
    """Operators, one for each call of a norm, that can take in what a norm does beside them.

    Attributes:
        calls: the operators; all of one module.
        sums: where each meets its call of the norm.
        map: what they are to add to what they compute, of what they read.
        crossed: the values between the norm and the sums, and between the operators and those, which change.
    """

    calls: tuple[Call, ...]
    sums: tuple[Call, ...]
    map: Map
    crossed: frozenset[Value]


def find_beside(
    graph: Graph, use: NormUse, map_: Map, known: Parameters, is_gone: IsGone
) -> Iterator[Beside | Refusal]:
    """Yield the operators that stand beside a norm, or why they cannot take it in, in the order of execution.

    Args:
        graph: the dataflow.
        use: the norm.
        map_: what it computes now.
        known: the parameters.
        is_gone: whether a norm has been taken away: it hands on what it gets.
    """
    meetings = [list(_meetings(graph, call, known, is_gone)) for call in use.calls]
    for first in meetings[0]:
        weight = first.operator.args["weight"]
        same = [next((m for m in of_call if m.operator.args["weight"] is weight), None) for of_call in meetings]
        try:
            yield _joined([m for m in same if m is not None], use, map_)
        except Refusal as refusal:
            refusal.calls = refusal.calls or (first.operator,)
            yield refusal


@dataclass(frozen=True, eq=False)
class _Meeting:
    """A call of a norm and an operator beside it, and the factors of their ways to the sum in which they meet."""

    norm: Call
    operator: Call
    sum: Call
    of_norm: Map
    of_operator: Map
    crossed: frozenset[Value]


def _joined(meetings: Sequence[_Meeting], use: NormUse, map_: Map) -> Beside:
    if len(meetings) < len(use.calls):
        raise Refusal(f"{location(meetings[0].operator)} is not beside all of its calls.")
    maps = [_missing(meeting, map_) for meeting in meetings]
    if not all(maps[0].same_as(other) for other in maps[1:]):
        raise Refusal("Beside its calls, different maps would have to be taken in.")
    operators = tuple(meeting.operator for meeting in meetings)
    if len(set(operators)) < len(operators):
        raise Refusal(f"{location(operators[0])} is beside several of its calls.")
    crossed = frozenset[Value]().union(*(meeting.crossed for meeting in meetings))
    return Beside(operators, tuple(meeting.sum for meeting in meetings), maps[0], crossed)


def _missing(meeting: _Meeting, map_: Map) -> Map:
    """Return what the operator has to add, as a map of the channels of what it reads."""
    operator, shape = linear_operator_of(meeting.operator), meeting.operator.output.shape
    assert operator is not None
    operator.require_own_element(meeting.operator)
    axis = operator.channel_axis(len(shape))
    whole = Map.per_channel(map_.scale.reshape(-1), map_.shift.reshape(-1), len(shape))
    scale, shift = whole.along(axis, shape[axis])
    (f, _), (g, _) = (m.along(axis, shape[axis]) for m in (meeting.of_norm, meeting.of_operator))
    missing = f * (scale - 1), f * shift
    if bool(((g == 0) & ((missing[0] != 0) | (missing[1] != 0))).any()):
        raise Refusal(f"What {location(meeting.operator)} returns is multiplied by zero before the sum.")
    safe = torch.where(g == 0, 1.0, g)
    return Map.per_channel(missing[0] / safe, missing[1] / safe, len(shape), axis)


# -- ways to a sum -----------------------------------------------------------------------------------------------------


def _meetings(graph: Graph, norm: Call, known: Parameters, is_gone: IsGone) -> Iterator[_Meeting]:
    root = _root(norm_input(norm), is_gone)
    way = _way(graph, norm.output, known, is_gone)
    if not way:
        return
    for call in graph.calls:
        read = None if linear_operator_of(call) is None else call.args.get("input")
        if not isinstance(read, Value) or _root(read, is_gone) is not root:
            continue
        meeting = _first_common(norm, call, way, _way(graph, call.output, known, is_gone))
        if meeting is not None:
            yield meeting


@dataclass(frozen=True, eq=False)
class _Pace:
    """A value on the way, who reads it, and the factor that it has in what that returns."""

    value: Value
    reader: Call
    factor: Map


def _first_common(norm: Call, operator: Call, one: Sequence[_Pace], two: Sequence[_Pace]) -> _Meeting | None:
    readers = {pace.reader for pace in one}
    end = next((pace for pace in two if pace.reader in readers), None)
    if end is None:
        return None
    here = next(pace for pace in one if pace.reader is end.reader)
    if here.value is end.value:
        return None
    crossed = {pace.value for way in (one, two) for pace in way if pace.reader.index <= end.reader.index}
    return _Meeting(norm, operator, end.reader, here.factor, end.factor, frozenset(crossed))


def _way(graph: Graph, value: Value, known: Parameters, is_gone: IsGone) -> list[_Pace]:
    """Return how a value goes on, as long as one operator alone reads it and is linear in it."""
    found: list[_Pace] = []
    factor = Map.identity(len(value.shape))
    while (reader := graph.only_reader(value)) is not None:
        try:
            own = _factor(reader, value, known, is_gone)
        except Refusal:
            break
        if own is None or tuple(reader.output.shape) != tuple(value.shape) or reader.output.dtype != value.dtype:
            break
        factor = Map(factor.scale * own, factor.shift)
        found.append(_Pace(value, reader, factor))
        value = reader.output
    return found


def _factor(call: Call, value: Value, known: Parameters, is_gone: IsGone) -> Tensor | float | None:
    """Return what an operator multiplies one of its operands by, whatever it adds to that; None if it does more."""
    if len(call.outputs) != 1 or call.op.namespace != "aten":
        return None
    if is_gone(call) or _passes(call):
        return 1.0
    name, first, other = family(call), call.args.get("self"), call.args.get("other")
    if name in ("add", "sub"):
        alpha = float(call.args.get("alpha", 1)) * (-1 if name == "sub" else 1)
        return None if first is other else 1.0 if first is value else alpha
    if name == "neg":
        return -1.0
    if name in ("mul", "div") and call.args.get("rounding_mode") is None:
        return _product(name, value, first, other, known)
    operator = absorber_of(call)
    return operator.factor(call, known) if isinstance(operator, Norm) and call.args["input"] is value else None


def _product(name: str, value: Value, first: Any, other: Any, known: Parameters) -> Tensor | float | None:
    if name == "div" and first is not value:
        return None
    partner = other if first is value else first
    plain = number(partner)
    if plain is None:
        if not isinstance(partner, Value) or partner.kind != "state":
            return None
        factor = known.tensor(partner)
        factor = factor.reshape([1] * (len(value.shape) - factor.dim()) + list(factor.shape))
    else:
        factor = torch.tensor(plain, dtype=torch.float64)
    return 1 / factor if name == "div" else factor


def _passes(call: Call) -> bool:
    """Whether an operator hands on what it gets, to the bit."""
    if family(call) in DROPOUTS:
        return not call.args.get("train", call.args.get("training", False)) or call.args["p"] == 0
    return family(call) in PASSING


def _root(value: Value, is_gone: IsGone) -> Value:
    """Return the value that has been handed on to this one."""
    while (producer := value.producer) is not None and (is_gone(producer) or _passes(producer)):
        read = producer.args.get("input", producer.args.get("self"))
        if not isinstance(read, Value) or len(producer.outputs) != 1 or read.dtype != value.dtype:
            break
        value = read
    return value
