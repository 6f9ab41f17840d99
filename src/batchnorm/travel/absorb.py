"""Operators that absorb a map: they are affine in what they read, with parameters of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.linear_operators import LINEAR_OPERATORS
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed, Demands, Knowledge, backward, forward, location

_CONVOLUTIONS = tuple(name for name in LINEAR_OPERATORS if name != "linear")


@backward(*LINEAR_OPERATORS)
def linear_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Absorbed:
    """Absorb a map of the output channels: s(W x + b) + t = (s W) x + (s b + t)."""
    shape = call.output.shape
    axis = LINEAR_OPERATORS[call.name].channel_axis(len(shape))
    _along(wanted[0], axis, shape, call, "output")
    return Absorbed("output", wanted[0])


@forward(*LINEAR_OPERATORS)
def linear_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Absorbed:
    """Absorb a map of the input channels: W(s x + t) + b = (W s) x + (W t + b)."""
    value = call.args["input"]
    if set(given) != {value}:
        raise Refusal(f"{call.name} reads it as a parameter.")
    axis = LINEAR_OPERATORS[call.name].channel_axis(len(value.shape))
    _along(given[value], axis, value.shape, call, "input")
    bordered = not given[value].only_scales and _has_border(call)
    if bordered and not bool((given[value].scale != 0).all()):
        raise Refusal(
            f"{location(call)} pads it with zeros, and the norm makes zero of nothing, where its scale is zero."
        )
    if bordered and not known.with_borders:
        raise Refusal(
            f"{location(call)} pads it with zeros, which the norm would not have made of zeros (with borders=True it "
            "pads with what makes them)."
        )
    return Absorbed("input", given[value], bordered)


def _along(map_: Map, axis: int, shape: Sequence[int], call: Call, which: str) -> None:
    """Require a map that varies along one axis only."""
    if any(
        size != 1 for values in (map_.scale, map_.shift) for other, size in enumerate(values.shape) if other != axis
    ):
        where = next(
            other
            for other in range(len(shape))
            if other != axis and max(map_.scale.shape[other], map_.shift.shape[other]) > 1
        )
        raise Refusal(
            f"It normalizes axis {where} of a tensor of shape {tuple(shape)}, while the {which} channels of "
            f"{call.name} are on axis {axis}."
        )


def _has_border(call: Call) -> bool:
    """Whether zeros, which have not been shifted, are read where there is no input."""
    if "transpose" in call.name:
        raise Refusal(f"No shift can cross {call.name}, whose outputs are sums of different numbers of terms.")
    padding = call.args.get("padding", 0)
    if isinstance(padding, str):
        return padding == "same"
    return call.name != "linear" and any(padding if isinstance(padding, list | tuple) else [padding])


@backward("embedding")
def embedding_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Absorbed:
    """Absorb a map of the features: every row of the table is mapped."""
    _along(wanted[0], len(call.output.shape) - 1, call.output.shape, call, "output")
    return Absorbed("output", wanted[0])


@backward("batch_norm")
def norm_backward(call: Call, wanted: Sequence[Map], known: Knowledge) -> Absorbed | Demands:
    """Absorb a map of the channels into γ and β."""
    _require_fixed(call)
    _along(wanted[0], 1, call.output.shape, call, "output")
    return Absorbed("output", wanted[0])


@forward("batch_norm")
def norm_forward(call: Call, given: Mapping[Value, Map], known: Knowledge) -> Absorbed:
    """Absorb a map of the channels into γ and β."""
    value = call.args["input"]
    _require_fixed(call)
    if set(given) != {value}:
        raise Refusal("A norm reads it as a parameter.")
    _along(given[value], 1, value.shape, call, "input")
    return Absorbed("input", given[value])


def _require_fixed(call: Call) -> None:
    if call.args["training"] or call.args["running_mean"] is None or call.args["running_var"] is None:
        raise Refusal("A norm in batch mode stands between.")
