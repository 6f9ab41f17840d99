"""The operator ``batchnorm::batch_norm``: what a call is where torch's own kernel does not serve it.

It is registered with torch's dispatcher as a composite operator, so that whoever watches the operators of a model (a
dispatch mode below autograd, a compiler) sees one normalization, whole, and not the arithmetic it is made of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.functional.autograd import normalize_with_batch_statistics, normalize_with_given_statistics
from batchnorm.kernels.contract import Counters
from batchnorm.kernels.running_statistics import count_call, update_running
from batchnorm.moments import expand_mask
from batchnorm.observers import notify

__all__ = ["SCHEMA", "batch_norm_operator", "composite"]

SCHEMA = (
    "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias, "
    "bool training, float momentum, float eps, Tensor? mask, Tensor? residual, str? activation, str backend, "
    "Tensor(c!)? num_batches_tracked=None, Tensor(d!)? refused=None) -> Tensor"
)

_library = torch.library.Library("batchnorm", "FRAGMENT")
_library.define(SCHEMA)


def composite(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    backend: str,
    num_batches_tracked: Tensor | None = None,
    refused: Tensor | None = None,
) -> Tensor:
    """Do what the operator does, out of what it is made of."""
    notify(input, running_mean, running_var, eps, mask)
    if input.dim() < 2:  # torch takes an empty vector and gives one back
        return input.clone()
    weight = weight if weight is None else weight.reshape(-1)
    bias = bias if bias is None else bias.reshape(-1)
    full = None if mask is None else expand_mask(mask, input, 1)
    if training:
        y, moments = normalize_with_batch_statistics(input, weight, bias, residual, full, eps, activation, backend)
        counters = Counters(num_batches_tracked, refused)
        if running_mean is not None and running_var is not None:
            update_running(running_mean, running_var, moments, momentum, counters)
        else:
            count_call(counters)
        return y
    assert running_mean is not None
    assert running_var is not None
    # a copy in any dtype: the backward pass needs the values of now
    mean = running_mean.detach().reshape(-1).to(torch.float64, copy=True)
    rstd = (running_var.detach().reshape(-1).double() + eps).rsqrt()
    return normalize_with_given_statistics(input, mean, rstd, weight, bias, residual, full, activation, backend)


_library.impl("batch_norm", composite, "CompositeImplicitAutograd")

batch_norm_operator = torch.ops.batchnorm.batch_norm.default
