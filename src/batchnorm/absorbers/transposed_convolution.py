"""Transposed convolutions: W of shape (Cin, Cout/groups, *kernel)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn, ops
from torch.fx import Node

from batchnorm.absorbers.convolution import Convolution
from batchnorm.absorbers.linear_operator import columns_of_each_group, rows
from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal

__all__ = ["TransposedConvolution"]


class TransposedConvolution(Convolution):
    """``conv_transpose1d``, ``conv_transpose2d`` and ``conv_transpose3d``: a convolution's axes the other way round.

    Args:
        n: number of spatial axes.
    """

    kind: ClassVar[str] = "transposed convolution"
    transposed: ClassVar[bool] = True
    _prefix: ClassVar[str] = "conv_transpose"
    _layers: ClassVar[Sequence[Any]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    _placed: ClassVar[Collection[str]] = (*Convolution._placed, "output_padding")
    _not_taken: ClassVar[Collection[str]] = ("transposed",)

    def _overload(self) -> Any:
        packet = getattr(ops.aten, self.name)
        return getattr(packet, packet.overloads()[0])

    def _pads_with_zeros(self, call: Call) -> bool:
        raise Refusal(f"No shift can cross {call.name}, whose outputs are sums of different numbers of terms.")

    def spread(self, scale: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Lay a factor per output channel out over a weight."""
        return columns_of_each_group(scale, weight, groups)

    def spread_inner(self, scale: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Lay a factor per input channel out over a weight."""
        return rows(scale, weight)

    def by_channel(self, weight: Tensor, groups: int) -> Tensor:
        """Return a weight (Cin, Cout/g, …) as (Cout, elements)."""
        per_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return per_group.transpose(1, 2).flatten(0, 1).flatten(1)

    def positions_of(self, call: Call) -> Value:
        """Return the input, at each position of which every element of the weight is used once."""
        value: Value = call.args["input"]
        return value

    def call_of(self, layer: Any, read: Node, weight: Node, bias: Node | None) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments of a node that computes a layer."""
        placed = (list(layer.stride), list(layer.padding), list(layer.output_padding))
        return self._overload(), (read, weight, bias, *placed, layer.groups, list(layer.dilation))
