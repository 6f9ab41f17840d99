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

    def call(mean: _Optional, var: _Optional) -> Tensor:
        return F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)

    if running_mean is None or running_var is None or _recorded():
        y = call(running_mean, running_var)
        if training:
            count_call(counters)
        return y
    if not training:
        if _looked_at() or not _differentiable(input, weight, bias):
            return call(running_mean, running_var)
        return call(running_mean.clone(), running_var.clone())
    mean, var = running_mean.clone(), running_var.clone()
    if _looked_at():
        y = call(running_mean, running_var)
        keep_finite(mean, var, running_mean, running_var, counters)
    else:
        y = call(mean, var)
        take_finite(mean, var, running_mean, running_var, counters)
    return y


def _looked_at() -> bool:
    """Return whether a dispatch mode looks at the operators: it knows a norm by the buffers that it is given."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _recorded() -> bool:
    """Return whether the call becomes part of a program, which is to hold torch's operator and nothing else."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


def _differentiable(*tensors: _Optional) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
