"""A call served by torch's own kernel, with this library's keeping of running statistics.

torch's kernel writes running statistics without a look at what it writes and without telling autograd, and keeps the
very buffers for its backward pass. So it is given copies. In training the copies take the step and are looked at before
the buffers take it over; in evaluation the backward pass finds the statistics that the forward pass has used, whatever
has happened to the buffers since.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.functional.observing import followed
from batchnorm.functional.running_statistics import Counters, count_call, keep_finite, take_finite

__all__ = ["torch_batch_norm"]

_Optional: TypeAlias = Tensor | None


def torch_batch_norm(
    input: Tensor,
    running_mean: _Optional,
    running_var: _Optional,
    weight: _Optional,
    bias: _Optional,
    training: bool,
    momentum: float,
    eps: float,
    counters: Counters,
) -> Tensor:
    """Do what ``torch.nn.functional.batch_norm`` does; in training a channel's step is taken only if it is finite."""
    if running_mean is None or running_var is None:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if training:
            count_call(counters)
        return y
    known = followed()
    if known and not _copies_allowed():
        return _with_the_buffers(input, running_mean, running_var, weight, bias, training, momentum, eps, counters)
    if not training and not _differentiable(input, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    mean, var = running_mean.clone(), running_var.clone()
    y = F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    if training:
        take_finite(mean, var, running_mean, running_var, counters, followed=known)
    return y


def _with_the_buffers(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: _Optional,
    bias: _Optional,
    training: bool,
    momentum: float,
    eps: float,
    counters: Counters,
) -> Tensor:
    """Do the same where others look at the call and know the norm by its buffers: an exporter, a dispatch mode."""
    looked_at = training and not _recorded()
    old = (running_mean.clone(), running_var.clone()) if looked_at else None
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if old is not None:
        keep_finite(*old, running_mean, running_var, counters)
    elif training:
        count_call(counters)
    return y


def _recorded() -> bool:
    """Return whether the call becomes part of a program, which is to hold torch's operator and nothing else."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def _copies_allowed() -> bool:
    """Return whether torch's operator may be given other tensors than the buffers."""
    return not _recorded() and (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0)


def _differentiable(input: Tensor, weight: _Optional, bias: _Optional) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
