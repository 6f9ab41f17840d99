"""Linear layers: y = W x + b along the last axis, W of shape (Cout, Cin)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import Node
from torch.nn import Module
from torch.nn import functional as F

from batchnorm.absorbers.linear_operator import LinearOperator
from batchnorm.absorbers.operator import Constant
from batchnorm.dataflow.refusal import Refusal

__all__ = ["Linear"]


class Linear(LinearOperator):
    """``linear``, which programs also write as a product with the transposed weight."""

    name = "linear"
    kind: ClassVar[str] = "linear"
    trailing = 0
    forms = ("linear", "addmm", "mm", "matmul")
    functions: Mapping[Any, Any] = MappingProxyType({F.linear: torch.ops.aten.linear.default})

    @property
    def noun(self) -> str:
        """What a sentence calls it."""
        return "linear layer"

    def settings(self, args: Mapping[str, Any]) -> Module:
        """Return the layer with its settings."""
        weight = args["weight"]
        if weight.dim() != 2:
            raise Refusal(f"The weight of linear has {weight.dim()} dimensions.")
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")

    def in_own_form(self, form: str, args: Mapping[str, Any], constant: Constant) -> Mapping[str, Any] | None:
        """Return the arguments of ``linear`` that compute a product with a constant matrix."""
        if form == "linear":
            return args
        weight = constant(args.get("mat2", args.get("other")))
        if weight is None or weight.dim() != 2:
            return None
        if form != "addmm":
            return {"input": args["self"], "weight": weight.t(), "bias": None}
        bias = constant(args["self"])
        if bias is None or bias.shape != weight.shape[1:] or (args["alpha"], args["beta"]) != (1, 1):
            return None
        return {"input": args["mat1"], "weight": weight.t(), "bias": args["self"]}

    def call_of(self, layer: Any, read: Node, weight: Node, bias: Node | None) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments of a node that computes a layer."""
        return torch.ops.aten.linear.default, (read, weight, bias)
