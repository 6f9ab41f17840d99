r"""A norm beside a linear operator: both read x, and what they return meets in a sum.

With the norm gone, an identity stands in its place. The operator takes in what is missing then,

.. math:: s x + t = x + \big((s - 1)\,x + t\big)

in the tap of its kernel that reads, of x, the very element that it computes: s − 1 there, t in the bias. That tap never
reads the padding, so that zeros at the border make no difference. Between each of the two and the sum
there may be factors of the channels: numbers, parameters, norms that stay. With f that of the norm and g that of
the operator, f/g of it all is taken in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from batchnorm.travel.join import added_factor, varying_factor
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import location

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
        is_gone: whether a norm has been taken away: it passes its input on.
    """
    pairs = [list(_parallel_pairs(graph, call, known, is_gone)) for call in use.calls]
    for first in pairs[0]:
        weight = first.operator.args["weight"]
        same = [next((pair for pair in of_call if pair.operator.args["weight"] is weight), None) for of_call in pairs]
        try:
            yield _of_all_calls([pair for pair in same if pair is not None], use, map_)
        except Refusal as refusal:
            refusal.calls = refusal.calls or (first.operator,)
            yield refusal


@dataclass(frozen=True, eq=False)
class _ParallelPair:
    """A call of a norm, an operator beside it, the sum of both, and the factors that each has in that sum."""

    norm: Call
    operator: Call
    sum: Call
    norm_factor: Map
    operator_factor: Map
    crossed: frozenset[Value]


def _of_all_calls(pairs: Sequence[_ParallelPair], use: NormUse, map_: Map) -> Beside:
    if len(pairs) < len(use.calls):
        raise Refusal(f"{location(pairs[0].operator)} is not beside all of its calls.")
    maps = [_added_map(pair, map_) for pair in pairs]
    if not all(maps[0].same_as(other) for other in maps[1:]):
        raise Refusal("Beside its calls, different maps would have to be taken in.")
    operators = tuple(pair.operator for pair in pairs)
    if len(set(operators)) < len(operators):
        raise Refusal(f"{location(operators[0])} is beside several of its calls.")
    crossed = frozenset[Value]().union(*(pair.crossed for pair in pairs))
    return Beside(operators, tuple(pair.sum for pair in pairs), maps[0], crossed)


def _added_map(pair: _ParallelPair, map_: Map) -> Map:
    """Return what the operator has to add, as a map of the channels of what it reads."""
    operator, shape = linear_operator_of(pair.operator), pair.operator.output.shape
    assert operator is not None
    operator.require_own_element(pair.operator)
    axis = operator.channel_axis(len(shape))
    whole = Map.per_channel(map_.scale.reshape(-1), map_.shift.reshape(-1), len(shape))
    scale, shift = whole.along(axis, shape[axis])
    (f, _), (g, _) = (factor.along(axis, shape[axis]) for factor in (pair.norm_factor, pair.operator_factor))
    missing = f * (scale - 1), f * shift
    if bool(((g == 0) & ((missing[0] != 0) | (missing[1] != 0))).any()):
        raise Refusal(f"What {location(pair.operator)} returns is multiplied by zero before the sum.")
    safe = torch.where(g == 0, 1.0, g)
    return Map.per_channel(missing[0] / safe, missing[1] / safe, len(shape), axis)


# -- the sum of both ---------------------------------------------------------------------------------------------------


def _parallel_pairs(graph: Graph, norm: Call, known: Parameters, is_gone: IsGone) -> Iterator[_ParallelPair]:
    source = _passed_on(norm_input(norm), is_gone)
    path = _linear_path(graph, norm.output, known, is_gone)
    if not path:
        return
    for call in graph.calls:
        read = None if linear_operator_of(call) is None else call.args.get("input")
        if isinstance(read, Value) and _passed_on(read, is_gone) is source:
            other = _linear_path(graph, call.output, known, is_gone)
            yield from _first_sum(norm, call, path, other)


@dataclass(frozen=True, eq=False)
class _Link:
    """A value, the operator that reads it, and the factor of the path's first value in what that returns."""

    value: Value
    reader: Call
    factor: Map


def _first_sum(norm: Call, operator: Call, one: Sequence[_Link], two: Sequence[_Link]) -> Iterator[_ParallelPair]:
    """Yield the pair whose sum is where the paths of a norm and an operator meet first, if they do."""
    of_norm = {link.reader: link for link in one}
    end = next((link for link in two if link.reader in of_norm), None)
    if end is None or of_norm[end.reader].value is end.value:
        return
    crossed = frozenset(link.value for link in (*one, *two) if link.reader.index <= end.reader.index)
    yield _ParallelPair(norm, operator, end.reader, of_norm[end.reader].factor, end.factor, crossed)


def _linear_path(graph: Graph, value: Value, known: Parameters, is_gone: IsGone) -> list[_Link]:
    """Return how a value goes on, as long as one operator alone reads it and is linear in it."""
    found: list[_Link] = []
    factor = Map.identity(len(value.shape))
    while (reader := graph.only_reader(value)) is not None:
        try:
            own = _factor(reader, value, known, is_gone)
        except Refusal:
            break
        if own is None or tuple(reader.output.shape) != tuple(value.shape) or reader.output.dtype != value.dtype:
            break
        factor = Map(factor.scale * own, factor.shift)
        found.append(_Link(value, reader, factor))
        value = reader.output
    return found


def _factor(call: Call, value: Value, known: Parameters, is_gone: IsGone) -> Tensor | float | None:
    """Return what an operator multiplies one of its operands by, whatever it adds to that; None if it does more."""
    if len(call.outputs) != 1 or call.op.namespace != "aten":
        return None
    if is_gone(call) or _passes(call):
        return 1.0
    name = family(call)
    if name in ("add", "sub"):
        first, other = call.args["self"], call.args["other"]
        return None if first is other else 1.0 if first is value else added_factor(call)
    if name == "neg":
        return -1.0
    if name in ("mul", "div"):
        varying = varying_factor(call, known)
        return None if varying is None or varying[0] is not value else varying[1]
    operator = absorber_of(call)
    return operator.factor(call, known) if isinstance(operator, Norm) and call.args["input"] is value else None


def _passes(call: Call) -> bool:
    """Whether an operator returns its input, to the bit."""
    if family(call) in DROPOUTS:
        return not call.args.get("train", call.args.get("training", False)) or call.args["p"] == 0
    return family(call) in PASSING


def _passed_on(value: Value, is_gone: IsGone) -> Value:
    """Return the value that operators have passed on to this one."""
    while (producer := value.producer) is not None and (is_gone(producer) or _passes(producer)):
        read = producer.args.get("input", producer.args.get("self"))
        if not isinstance(read, Value) or len(producer.outputs) != 1 or read.dtype != value.dtype:
            break
        value = read
    return value
