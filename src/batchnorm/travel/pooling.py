"""Operators that take means or maxima over positions, and those that put positions between others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.maps import Map
from batchnorm.travel.pointwise import operand, require_no_negative
from batchnorm.travel.rules import Demands, Knowledge, backward, forward, location

_N = (1, 2, 3)
_MEANS = (
    *(f"adaptive_avg_pool{n}d" for n in _N),
    *(f"_adaptive_avg_pool{n}d" for n in (2, 3)),
    *(f"avg_pool{n}d" for n in _N),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d"),
    *("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
"""Weighted sums over positions of one channel, whose weights add up to one."""
_MAXIMA = (*(f"max_pool{n}d" for n in _N), *(f"adaptive_max_pool{n}d" for n in _N),
           *(f"max_pool{n}d_with_indices" for n in _N))  # fmt: skip
_PADDINGS = ("pad", "constant_pad_nd", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in _N))


@backward(*_MEANS)
def mean_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Let a map through that is the same at all positions."""
    return [(operand(call), _through_mean(call, wanted[0]))]


@forward(*_MEANS)
def mean_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Let a map through that is the same at all positions."""
    return [_through_mean(call, given[operand(call)])]


def _through_mean(call: Call, map_: Map) -> Map:
    _require_same_everywhere(call, map_)
    padded = any(_list(call.args.get("padding", 0))) and call.args.get("count_include_pad", True)
    if (padded or call.args.get("divisor_override") is not None) and not map_.only_scales:
        raise Refusal(f"{location(call)} counts the zeros that it pads with, so that no shift can cross it.")
    return map_


@backward(*_MAXIMA)
def maximum_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Let a map through that keeps the order of the elements."""
    return [(operand(call), _through_maximum(call, wanted[0]))]


@forward(*_MAXIMA)
def maximum_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Let a map through that keeps the order of the elements."""
    map_ = _through_maximum(call, given[operand(call)])
    return [map_, *(Map.identity(len(indices.shape)) for indices in call.outputs[1:])]


def _through_maximum(call: Call, map_: Map) -> Map:
    _require_same_everywhere(call, map_)
    require_no_negative(call, map_)
    # where the positions of the maxima are returned, they must not change: not even by a scale of zero
    if len(call.outputs) > 1 and bool((map_.scale == 0).any()):
        raise Refusal(f"No scale of zero can cross {location(call)}, which also returns the positions of the maxima.")
    return map_


def _require_same_everywhere(call: Call, map_: Map) -> None:
    positions = next(int(c) for c in call.name if c in "123")
    if any(size != 1 for values in (map_.scale, map_.shift) for size in values.shape[-positions:]):
        raise Refusal(f"The map is not the same at all positions, which {call.name} mixes.")


# -- over whole axes -------------------------------------------------------------------------------------------------


@backward("mean", "amax")
def reduce_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Let a map through that is the same along the axes that are reduced."""
    value, map_ = operand(call), wanted[0]
    if call.args.get("keepdim", False) is not True:
        for axis in sorted(_axes(call, value)):
            map_ = map_.each(lambda values, axis=axis: values.unsqueeze(axis))  # type: ignore[misc]
    _require_order(call, map_)
    return [(value, map_)]


@forward("mean", "amax")
def reduce_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Let a map through that is the same along the axes that are reduced."""
    value = operand(call)
    map_, axes = given[value], _axes(call, value)
    if any(values.shape[axis] != 1 for axis in axes for values in (map_.scale, map_.shift)):
        raise Refusal(f"{call.name} is taken over the axis of the channels.")
    _require_order(call, map_)
    if call.args.get("keepdim", False) is True:
        return [map_]
    return [map_.each(lambda values: values.squeeze(tuple(axes)))]


def _require_order(call: Call, map_: Map) -> None:
    if call.name == "amax":
        require_no_negative(call, map_)
    if call.args.get("dtype") is not None and call.args["dtype"] != call.output.dtype:
        raise Refusal(f"{call.name} changes the type of the numbers.")


def _axes(call: Call, value: Value) -> list[int]:
    dim = call.args.get("dim")
    everything = list(range(len(value.shape)))
    return [axis % len(value.shape) for axis in _list(dim)] if dim not in (None, [], ()) else everything


def _list(value: object) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]


# -- padding ---------------------------------------------------------------------------------------------------------


@backward(*_PADDINGS)
def padding_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Let a map through that maps what is padded with to itself."""
    return [(operand(call), _through_padding(call, wanted[0]))]


@forward(*_PADDINGS)
def padding_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Let a map through that maps what is padded with to itself."""
    return [_through_padding(call, given[operand(call)])]


def _through_padding(call: Call, map_: Map) -> Map:
    pads = _list(call.args.get("pad", call.args.get("padding")))
    for pair in range(len(pads) // 2):
        axis = -1 - pair
        if (pads[2 * pair] or pads[2 * pair + 1]) and any(v.shape[axis] != 1 for v in (map_.scale, map_.shift)):
            raise Refusal(f"{call.name} pads the axis of the channels.")
    constant = call.name == "constant_pad_nd" or call.args.get("mode") == "constant"
    if constant and any(pads):
        value = torch.tensor(float(call.args.get("value") or 0.0), dtype=torch.float64, device="cpu")
        if not bool((map_.scale * value + map_.shift == value).all()):
            raise Refusal(
                f"{call.name} pads with {float(value):g}, which is not what the norm makes of {float(value):g}."
            )
    return map_
