"""What matters of an operator, told by its name: whether it normalizes or activates, and where it leaves the units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from batchnorm.nn.operators import is_norm_operator

__all__ = ["OperatorTraits", "traits_of"]


@dataclass(frozen=True)
class OperatorTraits:
    """What about an operator matters here.

    Attributes:
        operator: its name, without namespace and without the underscore of an in-place version.
        is_norm: whether it is a batch norm of torch.
        unit_dim: where the units of its output are; None if it leaves them where they were.
        may_activate: whether it may be an activation, by its arguments.
    """

    operator: str
    is_norm: bool
    unit_dim: int | None
    may_activate: bool


_FEATURES_LAST = {"addmm", "mm", "bmm", "baddbmm", "linear", "matmul", "native_layer_norm", "layer_norm", "embedding"}
_ACTIVATIONS = {
    "relu", "relu6", "sigmoid", "tanh", "hardsigmoid", "hardtanh", "threshold", "clamp", "clamp_min",
}  # fmt: skip


@cache
def traits_of(func: Any) -> OperatorTraits | None:
    """Return what matters about an operator, None if nothing does."""
    if not hasattr(func, "_schema"):
        return None
    space, _, name = func._schema.name.partition("::")
    operator = name.rstrip("_")
    normalizes = is_norm_operator(func)
    spatial = normalizes or "conv" in name or name in ("native_group_norm", "group_norm", "instance_norm")
    traits = OperatorTraits(
        operator,
        # our own operator reports itself, also above autograd, where a dispatch mode does not meet it whole
        normalizes and space != "batchnorm",
        1 if spatial else -1 if operator in _FEATURES_LAST else None,
        space == "aten" and operator in _ACTIVATIONS,
    )
    matters = traits.is_norm or traits.unit_dim is not None or traits.may_activate
    return traits if matters else None
