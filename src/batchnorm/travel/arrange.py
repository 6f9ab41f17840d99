"""Operators that put elements into another order, or leave some out: the map is arranged as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Demands, Knowledge, backward, forward

ARRANGING = (
    *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "diagonal"),
    *("expand", "expand_as", "repeat", "repeat_interleave", "tile", "flip", "roll"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "unfold"),
)


@backward(*ARRANGING)
def arrange_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Demands:
    """Give each element of the input the map of the places that it goes to; they have to agree."""
    value = _operand(call)
    size = torch.Size(value.shape).numel()
    places = _arranged(call, torch.arange(size, device="cpu").reshape(value.shape))
    scale = torch.full((size,), torch.nan, dtype=torch.float64, device="cpu")
    shift = scale.clone()
    for place, map_ in zip(places, wanted, strict=True):
        whole = map_.over(place.shape)
        for known_values, values in ((scale, whole.scale), (shift, whole.shift)):
            known_values[place.reshape(-1)] = values.reshape(-1)
    for place, map_ in zip(places, wanted, strict=True):
        whole = map_.over(place.shape)
        for known_values, values in ((scale, whole.scale), (shift, whole.shift)):
            if not bool((known_values[place.reshape(-1)] == values.reshape(-1)).all()):
                raise Refusal(f"{call.name} gives one element to places that need different maps.")
    return [(value, Map(*(_filled(values.reshape(value.shape), default)
                          for values, default in ((scale, 1.0), (shift, 0.0)))))]  # fmt: skip


@forward(*ARRANGING)
def arrange_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Sequence[Map]:
    """Arrange the map as the operator arranges the elements."""
    value = _operand(call)
    whole = given[value].over(value.shape)
    scales, shifts = (_arranged(call, values.contiguous()) for values in (whole.scale, whole.shift))
    return [Map(scale, shift).compact() for scale, shift in zip(scales, shifts, strict=True)]


def _operand(call: Call) -> Value:
    value = call.args.get("self")
    if not isinstance(value, Value) or len(list(call.tensor_args())) > 1:
        raise Refusal(f"{call.name} reads several tensors.")
    return value


def _arranged(call: Call, tensor: Tensor) -> list[Tensor]:
    """Return what the operator makes of a tensor in place of its operand."""
    args = dict(call.args) | {"self": tensor}
    other = args.get("other")
    if isinstance(other, Value):
        args["other"] = torch.empty(other.shape, device="cpu")
    result = call.op(**args)
    return [result] if isinstance(result, Tensor) else list(result)


def _filled(values: Tensor, default: float) -> Tensor:
    """Return values of size 1 along axes along which nothing varies; elements that go nowhere (NaN) follow the rest."""
    for axis in range(values.dim()):
        largest = values.nan_to_num(nan=-torch.inf).amax(axis, keepdim=True)
        smallest = values.nan_to_num(nan=torch.inf).amin(axis, keepdim=True)
        empty = values.isnan().all(axis, keepdim=True)
        if bool(((largest == smallest) | empty).all()):
            values = torch.where(empty, torch.nan, largest)
    return values.nan_to_num(nan=default)
