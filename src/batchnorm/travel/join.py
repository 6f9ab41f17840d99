"""Operators that put two tensors, or more, together: sums, products, concatenations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Demands, Knowledge, backward, forward, location, number

# -- concatenation ---------------------------------------------------------------------------------------------------


@backward("cat", "concat", "concatenate")
def cat_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Give each operand its part of the map."""
    axis, values, sizes = _parts(call)
    whole = _spread(wanted[0], axis, sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        (value, whole.each(lambda v, a=start, n=size: v.narrow(axis, a, n)).compact())  # type: ignore[misc]
        for value, start, size in zip(values, starts, sizes, strict=True)
    ]


@forward("cat", "concat", "concatenate")
def cat_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Put the operands' maps together; one that has not changed has the identity."""
    axis, values, sizes = _parts(call)
    maps = [given.get(value) or Map.identity(len(value.shape)) for value in values]
    spread = [_spread(map_, axis, size) for map_, size in zip(maps, sizes, strict=True)]
    return [Map(*(_joined([getattr(m, part) for m in spread], axis) for part in ("scale", "shift"))).compact()]


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    shapes = [[*part.shape[:axis], 1, *part.shape[axis + 1 :]] for part in parts]
    common = torch.broadcast_shapes(*shapes)
    return torch.cat([p.expand(*common[:axis], p.shape[axis], *common[axis + 1 :]) for p in parts], axis)


def _parts(call: Call) -> tuple[int, list[Value], list[int]]:
    values = [value for value in call.args["tensors"] if isinstance(value, Value)]
    dim = len(call.output.shape)
    axis = int(call.args["dim"]) % dim
    if any(len(value.shape) != dim for value in values):
        raise Refusal("It reads a concatenation with an empty tensor.")
    return axis, values, [value.shape[axis] for value in values]


def _spread(map_: Map, axis: int, size: int) -> Map:
    def along(values: Tensor) -> Tensor:
        return values.expand(*values.shape[:axis], size, *values.shape[axis + 1 :])

    return map_.each(along)


# -- sums ------------------------------------------------------------------------------------------------------------


@backward("add", "sub")
def add_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    r"""Let a + α b become s(a + α b) + t: both are scaled, the first one is shifted."""
    map_, first, other, alpha = wanted[0], call.args["self"], call.args["other"], added_factor(call)
    if first is other:
        # a + α a is shifted by t where a is shifted by t / (1 + α)
        return [(first, Map(map_.scale, map_.shift / (1 + alpha)))]
    constant = _constant(call, known)
    if constant is not None:
        value, added, factor = constant
        # factor · x + added: x has to make up for what is added and stays as it is
        shift = ((map_.scale - 1) * added + map_.shift) / factor
        return [(value, Map(map_.scale, shift).fitting(value.shape))]
    return [
        (first, map_.fitting(first.shape)),
        (other, Map(map_.scale, torch.zeros_like(map_.scale)).fitting(other.shape)),
    ]


@forward("add", "sub")
def add_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    r"""Return (s a + t) + α (s b + u) = s(a + α b) + t + α u: both have to be scaled alike."""
    first, other, alpha = call.args["self"], call.args["other"], added_factor(call)
    constant = _constant(call, known)
    if constant is not None:
        value, added, factor = constant
        map_ = _aligned(given[value], call)
        return [Map(map_.scale, factor * map_.shift + added - map_.scale * added)]
    maps = [_aligned(given.get(v) or Map.identity(len(v.shape)), call) for v in (first, other)]
    if not bool((maps[0].scale == maps[1].scale).all()):
        raise Refusal(f"{location(call)} adds it to a tensor that is not scaled alike.")
    return [Map(maps[0].scale * torch.ones_like(maps[1].scale), maps[0].shift + alpha * maps[1].shift)]


def _aligned(map_: Map, call: Call) -> Map:
    """Return an operand's map with the dimensions of what it is broadcast to."""
    dim = len(call.output.shape)
    return map_.each(lambda values: values.reshape([1] * (dim - values.dim()) + list(values.shape)))


def added_factor(call: Call) -> float:
    """Return what a sum multiplies its second operand by."""
    alpha = float(call.args.get("alpha", 1))
    return -alpha if call.name.startswith("sub") else alpha


def _constant(call: Call, known: Knowledge) -> tuple[Value, Any, float] | None:
    """Return the operand that varies, what is added to it, and its factor; None where both operands vary."""
    first, other, alpha = call.args["self"], call.args["other"], added_factor(call)
    if (plain := number(other)) is not None:
        return first, alpha * plain, 1.0
    if isinstance(other, Value) and other.kind == "state":
        return first, alpha * known.tensor(other), 1.0
    if isinstance(first, Value) and first.kind == "state" and isinstance(other, Value):
        return other, known.tensor(first), alpha
    if not (isinstance(first, Value) and isinstance(other, Value)):
        raise Refusal(f"{call.name} adds something that is no tensor.")
    return None


# -- products --------------------------------------------------------------------------------------------------------


@backward("mul", "div")
def mul_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Let k x become s k x + t, by x becoming s x + t/k; where k is computed too, the first operand takes a scale."""
    map_ = wanted[0]
    constant = varying_factor(call, known)
    if constant is not None:
        value, factor = constant
        if not map_.only_scales and not bool((factor != 0).all() if isinstance(factor, Tensor) else factor != 0):
            raise Refusal(f"No shift can cross {location(call)} by zero.")
        shift = map_.shift / factor if not map_.only_scales else map_.shift
        return [(value, Map(map_.scale, shift).fitting(value.shape))]
    if not map_.only_scales:
        raise Refusal(f"No shift can cross {location(call)} by a computed tensor.")
    first = call.args["self"]
    if tuple(first.shape) != tuple(call.output.shape):
        raise Refusal(f"{call.name} reads a smaller tensor first.")
    return [(first, map_)]


@forward("mul", "div")
def mul_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Return k(s x + t) = s(k x) + k t; where k is computed too, only a scale can cross."""
    constant = varying_factor(call, known)
    if constant is not None:
        value, factor = constant
        map_ = _aligned(given[value], call)
        return [Map(map_.scale, map_.shift * factor)]
    first, other = call.args["self"], call.args["other"]
    if call.name.startswith("div") and other in given:
        raise Refusal("It divides another tensor.")
    maps = [_aligned(given.get(v) or Map.identity(len(v.shape)), call) for v in (first, other)]
    if not all(map_.only_scales for map_ in maps):
        raise Refusal(f"No shift can cross {location(call)} by a computed tensor.")
    scale = maps[0].scale * maps[1].scale
    return [Map(scale, torch.zeros_like(scale))]


def varying_factor(call: Call, known: Knowledge) -> tuple[Value, Any] | None:
    """Return the operand that varies and what it is multiplied by; None where both operands vary."""
    first, other = call.args["self"], call.args["other"]
    divides = call.name.startswith("div")
    if divides and call.args.get("rounding_mode") is not None:
        raise Refusal(f"{call.name} rounds.")
    if (plain := number(other)) is not None:
        if divides and plain == 0:
            raise Refusal(f"{location(call)} divides by zero.")
        return first, 1 / plain if divides else plain
    if isinstance(other, Value) and other.kind == "state":
        factor = known.tensor(other)
        return first, 1 / factor if divides else factor
    if not divides and isinstance(first, Value) and first.kind == "state" and isinstance(other, Value):
        return other, known.tensor(first)
    if not (isinstance(first, Value) and isinstance(other, Value)):
        raise Refusal(f"{call.name} multiplies by something that is no tensor.")
    return None
