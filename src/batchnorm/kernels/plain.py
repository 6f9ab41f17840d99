"""What makes a tensor plain: its values lie in memory where its address and strides say, as they are.

Only such tensors are handed to kernels, which read addresses. A call is plain if its tensors are and nobody observes
it; that half of the question :mod:`batchnorm.observers` answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.kernels.contract import Counters

__all__ = ["ORDINARY", "is_counter", "is_ordinary", "is_per_channel", "is_plain", "takes_steps"]

ORDINARY = (Tensor, Parameter)
"""The classes of tensors that are what they seem; a subclass may hold its values elsewhere, or none."""


def is_ordinary(tensor: Tensor) -> bool:
    """Whether the tensor's values are those in its memory, on whatever device."""
    return type(tensor) in ORDINARY and tensor.layout is torch.strided and not tensor.is_neg()


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's values lie in this process's memory where its address and strides say."""
    return type(tensor) in ORDINARY and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_neg()


def is_per_channel(tensor: Tensor, dtype: torch.dtype, channels: int) -> bool:
    """Whether a tensor holds one value of that dtype for each channel, side by side."""
    return is_plain(tensor) and tensor.dtype is dtype and tensor.numel() == channels and tensor.is_contiguous()


def is_counter(tensor: Tensor | None) -> bool:
    """Whether kernels can count in it, or there is nothing to count in."""
    return tensor is None or (
        type(tensor) is Tensor and tensor.is_cpu and tensor.dtype is torch.int64 and tensor.numel() == 1
    )


def takes_steps(mean: Tensor, var: Tensor, counters: Counters) -> bool:
    """Whether kernels can write a step of running statistics into these buffers, and count it."""
    return (
        type(mean) is Tensor
        and type(var) is Tensor
        and mean.is_cpu
        and var.is_cpu
        and (mean.dtype is torch.float32 or mean.dtype is torch.float64)
        and mean.dtype is var.dtype
        and mean.is_contiguous()
        and var.is_contiguous()
        and not (mean.is_neg() or var.is_neg())
        and is_counter(counters.batches)
        and is_counter(counters.refused)
    )
