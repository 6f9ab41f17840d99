"""Which operators do the same job, by name: norms, activations, gates, and what only passes values on."""

from __future__ import annotations

from typing import Literal, TypeAlias

from batchnorm.dataflow.graph import Call, Value
from batchnorm.kernels.activation import ACTIVATIONS, leaky_relu

__all__ = [
    "BATCH_NORMS",
    "BETWEEN",
    "DROPOUTS",
    "NORMS",
    "PASSING",
    "PRODUCTS",
    "READS_FEATURES",
    "RESHAPING",
    "Kind",
    "activation_kind",
    "family",
    "fusible_activation",
    "suppresses",
]

Kind: TypeAlias = Literal["rectifying", "saturating"]

BATCH_NORMS = frozenset({"batch_norm"})
NORMS = BATCH_NORMS | {"group_norm", "instance_norm", "layer_norm", "rms_norm"}
DROPOUTS = frozenset({"alpha_dropout", "dropout", "feature_alpha_dropout", "feature_dropout"})

PASSING = frozenset({"alias", "clone", "contiguous", "detach"})
"""Operators that return their input."""

BETWEEN = (
    PASSING
    | DROPOUTS
    | {f"{kind}_pool{n}d" for kind in ("adaptive_avg", "adaptive_max", "avg", "max") for n in (1, 2, 3)}
)
"""Operators across which a norm still decides what an activation gets: they work within a channel."""

READS_FEATURES = {
    *("addmm", "baddbmm", "bilinear", "bmm", "einsum", "gru", "gru_cell", "lstm", "lstm_cell", "matmul", "mm"),
    *("rnn_relu", "rnn_tanh", "rnn_relu_cell", "rnn_tanh_cell", "scaled_dot_product_attention"),
}
"""Layers in the wide sense, beside linear ones: what comes before one is hidden, not the model's answer."""

PRODUCTS = frozenset({"addcmul", "baddbmm", "bmm", "einsum", "lerp", "matmul", "mm", "mul", "where"})
"""Operators in which one tensor can gate another."""

RESHAPING = PASSING | {
    *("chunk", "expand", "expand_as", "flatten", "interpolate", "mean", "narrow", "permute", "repeat", "reshape"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "transpose", "unbind", "unflatten", "unsqueeze"),
    *("upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d", "view", "view_as", "to"),
    *("add", "div", "mul", "neg", "rsub", "sub", *DROPOUTS),
}
"""What a gate may go through on its way to the product; the arithmetic counts with a number or parameter only."""

# SELU is missing on purpose: it normalizes by itself, for inputs that come straight from the layer.
_RECTIFYING = frozenset(
    {"celu", "elu", "gelu", "hardswish", "leaky_relu", "mish", "prelu", "relu", "relu6", "rrelu", "silu"}
)
_SATURATING = frozenset({"hardsigmoid", "sigmoid", "tanh"})


def family(call: Call) -> str:
    """Return the operator's name without the underscore that marks an in-place variant."""
    return call.name.rstrip("_")


def _lower_limit(call: Call) -> object:
    """Return where an operator that cuts its input off below does so; None when it is no such operator."""
    name = family(call)
    if name == "hardtanh":
        return call.args["min_val"]
    if name in ("clamp", "clamp_min"):
        return call.args["min"]
    if name == "threshold" and call.args["threshold"] == call.args["value"]:
        return call.args["value"]
    return 0 if name in ("relu", "relu6") else None


def suppresses(call: Call) -> bool:
    """Whether the operator sets everything below zero to zero, as ReLU does."""
    limit = _lower_limit(call)
    return not isinstance(limit, Value) and limit == 0


def activation_kind(call: Call) -> Kind | None:
    """Return ``"rectifying"`` for ReLU and its relatives, ``"saturating"`` for sigmoid, tanh and their piecewise forms.

    SELU is neither: it normalizes by itself. Softmax, softplus and GLU are not either.
    """
    name = family(call)
    if name in _SATURATING or (name == "hardtanh" and call.args["min_val"] < 0):
        return "saturating"
    return "rectifying" if name in _RECTIFYING or suppresses(call) else None


# What a fused activation is computed with; another value makes it another function.
_FUSED_WITH: dict[str, dict[str, object]] = {
    "gelu": {"approximate": "none"},
    "hardtanh": {"min_val": 0, "max_val": 6},
}


def fusible_activation(call: Call) -> str | None:
    """Return the name, as a fused call knows it, of the function that the operator computes; None if it knows none."""
    name = family(call)
    if name == "leaky_relu" and call.op.namespace == "aten":
        slope = call.args["negative_slope"]
        return leaky_relu(slope) if isinstance(slope, float | int) else None
    if any(call.args.get(key) != value for key, value in _FUSED_WITH.get(name, {}).items()):
        return None
    name = "relu6" if name == "hardtanh" else name
    return name if name in ACTIVATIONS and call.op.namespace == "aten" else None
