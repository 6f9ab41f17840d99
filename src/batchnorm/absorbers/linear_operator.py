"""Operators that compute weighted sums, W * x + b, with a bias per output channel."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from batchnorm.absorbers.operator import AbsorbingOperator, Hold, LayerParameters
from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.rules import Absorbed, Knowledge, location

__all__ = ["LinearOperator", "columns_of_each_group", "rows"]


class LinearOperator(AbsorbingOperator):
    """An operator that is linear in its input, with a weight and a bias per output channel.

    Attributes:
        trailing: number of axes behind the channels: 2 for ``conv2d``, 0 for ``linear``.
    """

    trailing: int

    def channel_axis(self, dim: int) -> int:
        """Return the axis of the channels in a tensor of ``dim`` axes."""
        return dim - 1 - self.trailing

    # -- how factors lie over the weight -------------------------------------------------------------------------------

    def spread(self, scale: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Lay a factor per output channel out over a weight."""
        return rows(scale, weight)

    def spread_inner(self, scale: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Lay a factor per input channel out over a weight."""
        return columns_of_each_group(scale, weight, groups)

    def by_channel(self, weight: Tensor, groups: int) -> Tensor:
        """Return a weight (Cout, Cin/g, …) as (Cout, elements)."""
        return weight.flatten(1)

    # -- parameters ----------------------------------------------------------------------------------------------------

    def merge(self, call: Call, absorbed: Absorbed, now: LayerParameters, known: Knowledge) -> LayerParameters:
        """Return the weight and bias with which the operator computes a map, too, of its output or its input."""
        absorb = self.absorb_output if absorbed.side == "output" else self.absorb_input
        groups = int(call.args.get("groups", 1))
        return LayerParameters(*absorb(*self.channels_of(call, absorbed), now.weight, now.bias, groups), now.border)

    def absorb_output(
        self, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, groups: int
    ) -> tuple[Tensor, Tensor]:
        r"""Return weight and bias, float64, with which the operator computes what it and a map behind it computed.

        .. math::

            s (W * x + b) + t = (s W) * x + (s b + t)
        """
        merged = self.spread(scale, weight, groups) * weight.detach().double()
        return merged, shift.clone() if bias is None else scale * bias.detach().double() + shift

    def absorb_input(
        self, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, groups: int
    ) -> tuple[Tensor, Tensor | None]:
        r"""Return weight and bias, float64, with which the operator computes of x what it computed of s·x + t.

        .. math::

            W * (s x + t) + b = (W s) * x + (b + \textstyle\sum W t)

        The sum is over the input channels and the taps: all of them are read everywhere, so that no zeros are padded,
        or t is 0. Then the bias stays as it is, None too.
        """
        double = weight.detach().double()
        merged = self.spread_inner(scale, weight, groups) * double
        if not bool(shift.any()):
            return merged, None if bias is None else bias.detach().double()
        added = (self.spread_inner(shift, weight, groups) * double).flatten(1).sum(1)
        return merged, added if bias is None else bias.detach().double() + added

    def absorb_beside(self, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""Return weight and bias, float64, with which the operator adds s·x + t of what it reads to its output.

        .. math::

            (W * x + b) + (s x + t) = (W + s\,\delta) * x + (b + t)

        δ is the kernel that keeps each channel: 1 at its middle tap, from a channel to itself. With as many channels
        out as in, of g groups of n each, channel c is the (c mod n)-th of its group; a weight of a transposed
        convolution has its axes the other way round, which makes no difference here.
        """
        merged = weight.detach().double().clone(memory_format=torch.contiguous_format)
        channels = torch.arange(len(merged), device="cpu")
        middle = merged.reshape(*merged.shape[:2], -1)  # a view; of an odd number of taps along every axis
        middle[channels, channels % merged.shape[1], middle.shape[2] // 2] += scale
        return merged, shift.clone() if bias is None else bias.detach().double() + shift

    def require_own_element(self, call: Call) -> None:
        """Require a call that has, for every element it computes, a tap that reads the same element.

        Raises:
            Refusal: it has none.
        """
        if tuple(call.args["input"].shape) != tuple(call.output.shape):
            raise Refusal(f"{location(call)} returns another shape than it reads.")

    # -- costs ---------------------------------------------------------------------------------------------------------

    def multiply_adds(self, call: Call) -> int:
        """Return the elements of the weight times the positions."""
        weight = call.args.get("weight")
        if not isinstance(weight, Value):
            return 0
        counted = self.positions_of(call)
        channels = counted.shape[self.channel_axis(len(counted.shape))]
        return math.prod(weight.shape) * (math.prod(counted.shape) // max(channels, 1))

    def positions_of(self, call: Call) -> Value:
        """Return the value at each position of which every element of the weight is used once."""
        return call.output

    # -- programs ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def call_of(self, layer: Any, read: Node, weight: Node, bias: Node | None) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments of a node that computes a layer, given the nodes that it reads."""

    def written(self, layer: Any, node: Node, hold: Hold) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments with which a node of a program computes a layer."""
        read = node.args[0]
        assert isinstance(read, Node)
        weight = hold("weight", layer.weight)
        bias = None if layer.bias is None else hold("bias", layer.bias)
        return self.call_of(layer, read, weight, bias)


def rows(scale: Tensor, weight: Tensor) -> Tensor:
    """Lay out a factor per row over a weight: per output channel, or per input channel of a transposed convolution."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def columns_of_each_group(scale: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Lay out a factor per column over a weight whose rows come in groups, each with columns of its own.

    Of a transposed convolution, (Cin, Cout/g, …), the rows of group j feed the output channels j·Cout/g …
    (j+1)·Cout/g − 1; of any other, (Cout, Cin/g, …), they read the input channels j·Cin/g … (j+1)·Cin/g − 1.
    """
    per_group = scale.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return per_group.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))
