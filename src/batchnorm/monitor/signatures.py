"""What matters of an operator, told by its name: whether it normalizes or activates, and where it leaves the units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from batchnorm.nn.operators import is_norm_operator

__all__ = ["Signature", "signature_of"]


@dataclass(frozen=True)
class Signature:
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
def signature_of(func: Any) -> Signature | None:
    """Return what matters about an operator, None if nothing does."""
    if not hasattr(func, "_schema"):
        return None
    space, _, name = func._schema.name.partition("::")
    operator = name.rstrip("_")
    normalizes = is_norm_operator(func)
    spatial = normalizes or "conv" in name or name in ("native_group_norm", "group_norm", "instance_norm")
    signature = Signature(
        operator,
        # our own operator reports itself, also above autograd, where a dispatch mode does not meet it whole
        normalizes and space != "batchnorm",
        1 if spatial else -1 if operator in _FEATURES_LAST else None,
        space == "aten" and operator in _ACTIVATIONS,
    )
    matters = signature.is_norm or signature.unit_dim is not None or signature.may_activate
    return signature if matters else None
