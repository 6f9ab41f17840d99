"""Convolutions that pad with a value for each channel instead of zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Module
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from batchnorm.errors import StateError
from batchnorm.models.modules import twin

__all__ = ["BorderedConv1d", "BorderedConv2d", "BorderedConv3d", "bordered", "plain"]


class _Bordered(_ConvNd):
    r"""A convolution whose input is padded with one value per channel.

    A norm before a convolution that pads with zeros, s·x + t, is the convolution's own affair if it reads, where there
    was padding, what the norm would have made zero:

    .. math:: \mathrm{border} = -\frac ts

    Weight and bias, their names, and everything but the padding are those of the convolution that it stands for.

    Attributes:
        border: the values, (C,), a buffer.
    """

    border: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the input, (N, C, ...), padded with ``border``.

        Made of what exporters keep for any batch and size, and of what keeps the input's memory format.
        """
        pads, n = self._reversed_padding_repeated_twice, len(self.kernel_size)
        outside = F.pad(input.new_zeros(input.shape[-n:]), pads, value=1.0)
        border = self.border.to(input.dtype).view(-1, *[1] * n)
        padded = torch.where(outside > 0, border, F.pad(input, pads))
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
        out: Tensor = convolve(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return out

    def extra_repr(self) -> str:
        """Return what the convolution shows, and that it has a border."""
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, border"


class BorderedConv1d(_Bordered, Conv1d):
    """A 1-d convolution that pads with one value per channel."""


class BorderedConv2d(_Bordered, Conv2d):
    """A 2-d convolution that pads with one value per channel."""


class BorderedConv3d(_Bordered, Conv3d):
    """A 3-d convolution that pads with one value per channel."""


_OF: dict[type[Module], type[_Bordered]] = {Conv1d: BorderedConv1d, Conv2d: BorderedConv2d, Conv3d: BorderedConv3d}


def bordered(conv: Module, border: Tensor) -> Module:
    """Return a convolution with the same parameters, and everything else, that pads with ``border``, (C,).

    A convolution that pads with a border already gets the other one.

    Raises:
        StateError: the module is of another class than ``torch.nn.Conv1d``, ``2d`` or ``3d``, or pads otherwise.
    """
    kind = type(conv) if isinstance(conv, _Bordered) else _OF.get(type(conv))
    if kind is None or not isinstance(conv, _ConvNd) or conv.padding_mode != "zeros":
        raise StateError(f"{type(conv).__name__} is no convolution of torch's that pads with zeros.")
    other = twin(conv, kind)
    other._buffers["border"] = border.to(conv.weight)
    return other


def plain(conv: Module) -> Module:
    """Return the convolution that a bordered one stands for: the same parameters, padded with zeros."""
    kind = next((cls for cls, other in _OF.items() if isinstance(conv, other)), None)
    if kind is None:
        raise StateError(f"{type(conv).__name__} is no convolution that pads with a border.")
    other = twin(conv, kind)
    del other._buffers["border"]
    return other
