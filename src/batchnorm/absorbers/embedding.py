"""Embeddings: rows of a table, of shape (rows, features)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import Module
from torch.nn import functional as F

from batchnorm.absorbers.operator import AbsorbingOperator, Constant, Hold, LayerParameters
from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.nn.operators import bound_arguments
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed, Knowledge, location

__all__ = ["Embedding"]


class Embedding(AbsorbingOperator):
    """``embedding``: a map of the features is a map of every row of the table."""

    name = "embedding"
    kind: ClassVar[str] = "embedding"
    reads: ClassVar[str] = "indices"
    multiplies: ClassVar[bool] = False
    forms = ("embedding",)

    def channel_axis(self, dim: int) -> int:
        """Return the axis of the features, the last one."""
        return dim - 1

    def forward(self, call: Call, given: Mapping[Value, Map], known: Knowledge) -> Absorbed:
        """Refuse: it reads indices.

        Raises:
            Refusal: always.
        """
        raise Refusal(f"{location(call)} reads it, which is no linear operator.")

    def needs_bias(self, absorbed: Absorbed) -> bool:
        """Whether it needs a bias: the shift goes into the rows."""
        return False

    def merge(self, call: Call, absorbed: Absorbed, now: LayerParameters, known: Knowledge) -> LayerParameters:
        """Return the table with every row mapped."""
        scale, shift = self.channels_of(call, absorbed)
        return LayerParameters(scale * now.weight + shift)

    def by_channel(self, weight: Tensor, groups: int) -> Tensor:
        """Return the table as (features, rows)."""
        return weight.t()

    def settings(self, args: Mapping[str, Any]) -> Module:
        """Return the layer with its settings."""
        rows, features = args["weight"].shape
        padding = args["padding_idx"]
        return nn.Embedding(
            rows,
            features,
            padding_idx=None if padding == -1 else padding,
            scale_grad_by_freq=args["scale_grad_by_freq"],
            sparse=args["sparse"],
            device="meta",
        )

    def arguments(
        self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], constant: Constant
    ) -> Mapping[str, Any] | None:
        """Return the operator's arguments, if that is what a node of a program computes; else None."""
        if target is not F.embedding:
            return super().arguments(target, args, kwargs, constant)
        given = bound_arguments(target, args, kwargs)
        if given["max_norm"] is not None:  # it writes into the table
            return None
        padding = -1 if given["padding_idx"] is None else given["padding_idx"]
        same = {key: given[key] for key in ("weight", "scale_grad_by_freq", "sparse")}
        return {"indices": given["input"], "padding_idx": padding, **same}

    def written(self, layer: Any, node: Node, hold: Hold) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments with which a node of a program computes a layer."""
        padding = -1 if layer.padding_idx is None else layer.padding_idx
        weight = hold("weight", layer.weight)
        return (
            torch.ops.aten.embedding.default,
            (weight, node.args[0], padding, layer.scale_grad_by_freq, layer.sparse),
        )
