"""Where a shift of a layer's channels ends: the norms that take it out again.

With the statistics of the batch, a norm is blind to a shift per channel, N(y + b) = N(y). So it is behind operators
that carry the shift on unchanged, P(y + b) = P(y) + b: averages whose weights sum to one (pooling without zeros from
padding, means, interpolation), maxima, and operators that only rearrange.
"""

from __future__ import annotations

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.checks.axes import moved_axis
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.operator_kinds import BATCH_NORMS, family

__all__ = ["cancelling_norms"]

_RESHAPING = {"_unsafe_view", "flatten", "reshape", "squeeze", "unsqueeze", "view"}
_POOLS = {f"{kind}_pool{n}d": n for kind in ("adaptive_avg", "avg", "max") for n in (1, 2, 3)}
_UPSAMPLING = {
    **{f"upsample_nearest{n}d": n for n in (1, 2, 3)},
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
}
_WITHIN_CHANNELS = _POOLS | _UPSAMPLING
"""Operators that work on the last axes, so many, of each channel."""


def cancelling_norms(graph: Graph, layer: Call) -> tuple[list[Call], list[Value]]:
    """Return the norms in which a shift of the layer's output ends, and the values on the way to them.

    There are none if anything else reads one of these values, or if the norms take another axis for channels.
    """
    operator = linear_operator_of(layer)
    if operator is None:
        return [], []
    axis = operator.channel_axis(len(layer.output.shape))
    norms: list[Call] = []
    waiting = [(layer.output, axis)]
    values = [layer.output]
    while waiting:
        value, axis = waiting.pop(0)
        readers = graph.readers(value)
        if not readers or graph.is_output(value):
            return [], []
        for reader in readers:
            if family(reader) in BATCH_NORMS:
                if reader.args["input"] is not value or axis != 1:
                    return [], []
                norms.append(reader)
                continue
            after = _carried(reader, value, axis)
            if after is None:
                return [], []
            values.append(reader.output)
            waiting.append((reader.output, after))
    return norms, values


def _carried(call: Call, value: Value, axis: int) -> int | None:
    """Return the axis of the channels behind an operator that carries a shift on as it is; None for any other."""
    name, rank = family(call), len(value.shape)
    if len(call.outputs) != 1:
        return None
    if name in _WITHIN_CHANNELS:
        return axis if axis < rank - _WITHIN_CHANNELS[name] and not _pads_with_zeros(call) else None
    if name == "mean":
        return _axis_after_mean(call, axis, rank)
    if name in _RESHAPING:
        return axis if axis == 1 and call.output.shape[:2] == value.shape[:2] else None
    return moved_axis(call, axis, rank)


def _pads_with_zeros(call: Call) -> bool:
    """Whether zeros enter averages, or another divisor than their number."""
    if not family(call).startswith("avg_pool"):
        return False  # maximum pooling pads with −∞, and the others do not pad
    padding = call.args["padding"]
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return (padded and call.args["count_include_pad"]) or call.args.get("divisor_override") is not None


def _axis_after_mean(call: Call, axis: int, rank: int) -> int | None:
    dims = call.args.get("dim")
    if dims is None:
        return None
    taken = {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}
    if not taken or axis in taken:
        return None
    return axis if call.args["keepdim"] else axis - sum(d < axis for d in taken)
