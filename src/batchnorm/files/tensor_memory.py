"""A tensor's elements, however they lie in memory: their bytes, and those that share none with each other."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Footprint", "bytes_of", "footprint", "repeats", "without_repeats"]


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of all elements in the order of the indices, uint8, (n,), on the tensor's device.

    They share memory with the tensor where they can. That a tensor is contiguous does not say what the strides of its
    axes of size 1 are: of a 1×1 kernel in channels_last they are those of the channels, and ``view(torch.uint8)``
    refuses it. Hence strides of their own.

    Args:
        tensor: dense, with any strides.

    >>> kernel = torch.zeros(2, 3, 1, 1).to(memory_format=torch.channels_last)
    >>> kernel.is_contiguous(), kernel.stride(), bytes_of(kernel).shape
    (True, (3, 1, 3, 3), torch.Size([24]))
    """
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


Footprint: TypeAlias = tuple[int, torch.dtype, tuple[tuple[int, int], ...]]


def footprint(tensor: Tensor) -> Footprint:
    """Return which places in memory a tensor's elements take, whatever their order: its address alone does not tell.

    >>> square = torch.zeros(3, 3)
    >>> footprint(square) == footprint(square.t()) == footprint(square.view(-1))
    True
    >>> square[0].data_ptr() == square[:, 0].data_ptr(), footprint(square[0]) == footprint(square[:, 0])
    (True, False)
    """
    axes: list[tuple[int, int]] = []
    for stride, size in sorted(axis for axis in zip(tensor.stride(), tensor.shape, strict=True) if axis[1] != 1):
        if axes and stride == axes[-1][0] * axes[-1][1]:
            stride, size = axes[-1][0], axes.pop()[1] * size
        axes.append((stride, size))
    return tensor.data_ptr(), tensor.dtype, tuple(axes)


def without_repeats(tensor: Tensor) -> Tensor:
    """Return a view that has an expanded tensor's elements once, so that it can be written in place.

    >>> without_repeats(torch.zeros(1, 3).expand(4, 3)).shape
    torch.Size([1, 3])
    """
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def repeats(tensor: Tensor) -> bool:
    """Whether a tensor is expanded: it has elements that are the same place in memory, and cannot be written."""
    return tensor.layout == torch.strided and without_repeats(tensor).shape != tensor.shape
