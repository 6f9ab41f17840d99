"""A norm with fixed statistics as one affine map per channel, and how linear operators absorb it.

Each operator that can absorb such a map is one row of :data:`LINEAR_OPERATORS`: what it is called, on which axis it
puts its channels, and how a factor per output channel is laid out over its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LINEAR_OPERATORS", "Affine", "LinearOperator"]


@dataclass(frozen=True)
class Affine:
    r"""An affine map per channel, :math:`y = s x + t`.

    Attributes:
        scale: s, float64, shape (C,).
        shift: t, float64, shape (C,).
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of_norm(cls, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
        r"""Return the map that a norm with fixed statistics is, computed in float64.

        .. math::

            s = \frac{\gamma}{\sqrt{\mathrm{var} + \varepsilon}} \qquad t = \beta - \mathrm{mean} \cdot s

        ``var`` is taken as it is stored: no divisor is added or removed. Without ``weight`` γ = 1, without ``bias``
        β = 0 (Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2, line 11).

        Example:
            >>> import torch
            >>> from batchnorm.dataflow.linear_operators import Affine
            >>> one = torch.ones(1)
            >>> Affine.of_norm(mean=3 * one, var=4 * one, weight=None, bias=one, eps=0.0)
            Affine(scale=tensor([0.5000], dtype=torch.float64), shift=tensor([-0.5000], dtype=torch.float64))
        """
        mean, var = mean.detach().double(), var.detach().double()
        scale = torch.rsqrt(var + eps) if weight is None else weight.detach().double() / torch.sqrt(var + eps)
        shift = -mean * scale if bias is None else bias.detach().double() - mean * scale
        return cls(scale, shift)


def _rows(scale: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Lay out a factor per row over a weight: per output channel, or per input channel of a transposed convolution."""
    del groups
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def _columns_of_each_group(scale: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Lay out a factor per column over a weight whose rows come in groups, each with columns of its own.

    Of a transposed convolution, (Cin, Cout/g, …), the rows of group j feed the output channels j·Cout/g …
    (j+1)·Cout/g − 1; of any other, (Cout, Cin/g, …), they read the input channels j·Cin/g … (j+1)·Cin/g − 1.
    """
    per_group = scale.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return per_group.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))


def _each_row(weight: Tensor, groups: int) -> Tensor:
    """Return a weight (Cout, Cin/g, …) as (Cout, elements)."""
    del groups
    return weight.flatten(1)


def _each_column_of_each_group(weight: Tensor, groups: int) -> Tensor:
    """Return a weight (Cin, Cout/g, …) of a transposed convolution as (Cout, elements)."""
    per_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return per_group.transpose(1, 2).flatten(0, 1).flatten(1)


@dataclass(frozen=True)
class LinearOperator:
    """An operator that is linear in its input, with a weight and a bias per output channel.

    Attributes:
        kind: what it is called in a sentence.
        trailing: number of axes after the channels in its output: 2 for ``conv2d``, 0 for ``linear``.
        spread: lays a factor per output channel out over the weight, given the weight and the number of groups.
        spread_inner: does so for a factor per input channel.
        by_channel: arranges the weight, given it and the number of groups, as (Cout, elements).
    """

    kind: str
    trailing: int
    spread: Callable[[Tensor, Tensor, int], Tensor]
    spread_inner: Callable[[Tensor, Tensor, int], Tensor]
    by_channel: Callable[[Tensor, int], Tensor]

    def channel_axis(self, dim: int) -> int:
        """Return the axis of the channels in an output of ``dim`` axes."""
        return dim - 1 - self.trailing

    def absorb(self, affine: Affine, weight: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
        r"""Return weight and bias, float64, with which the operator computes what it and ``affine`` computed before.

        .. math::

            s (W * x + b) + t = (s W) * x + (s b + t)
        """
        merged = self.spread(affine.scale, weight, groups) * weight.detach().double()
        if bias is None:
            return merged, affine.shift.clone()
        return merged, affine.scale * bias.detach().double() + affine.shift

    def absorb_beside(self, affine: Affine, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""Return weight and bias, float64, with which the operator adds to its output ``affine`` of what it reads.

        .. math::

            (W * x + b) + (s x + t) = (W + s\,\delta) * x + (b + t)

        δ is the kernel that hands on each channel: 1 at its middle tap, from a channel to itself. With as many channels
        out as in, of g groups of n each, channel c is the (c mod n)-th of its group; a weight of a transposed
        convolution has its axes the other way round, which makes no difference here.
        """
        merged = weight.detach().double().clone(memory_format=torch.contiguous_format)
        channels = torch.arange(len(merged))
        middle = merged.reshape(*merged.shape[:2], -1)  # a view; of an odd number of taps along every axis
        middle[channels, channels % merged.shape[1], middle.shape[2] // 2] += affine.scale
        return merged, affine.shift.clone() if bias is None else bias.detach().double() + affine.shift

    def absorb_inner(
        self, affine: Affine, weight: Tensor, bias: Tensor | None, groups: int
    ) -> tuple[Tensor, Tensor | None]:
        r"""Return weight and bias, float64, with which the operator computes of x what it computed of ``affine`` of x.

        .. math::

            W * (s x + t) + b = (W s) * x + (b + \textstyle\sum W t)

        The sum is over the input channels and the taps: all of them are read everywhere, so that no zeros are padded,
        or t is 0. Then the bias stays as it is, None too.
        """
        double = weight.detach().double()
        merged = self.spread_inner(affine.scale, weight, groups) * double
        if not bool(affine.shift.any()):
            return merged, None if bias is None else bias.detach().double()
        added = (self.spread_inner(affine.shift, weight, groups) * double).flatten(1).sum(1)
        return merged, added if bias is None else bias.detach().double() + added


def _convolutions() -> Mapping[str, LinearOperator]:
    table = {"linear": LinearOperator("linear", 0, _rows, _columns_of_each_group, _each_row)}
    for n in (1, 2, 3):
        table[f"conv{n}d"] = LinearOperator("convolution", n, _rows, _columns_of_each_group, _each_row)
        table[f"conv_transpose{n}d"] = LinearOperator(
            "transposed convolution", n, _columns_of_each_group, _rows, _each_column_of_each_group
        )
    return table


LINEAR_OPERATORS: Mapping[str, LinearOperator] = _convolutions()
"""The operators that can absorb an affine map of their output, by their name in the aten namespace."""
