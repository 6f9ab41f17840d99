"""A call served by torch's own kernel, with this library's keeping of running statistics.

torch's kernel writes running statistics without a look at what it writes and without telling autograd, and keeps the
very buffers for its backward pass. So it is given copies. In training the copies take the step and are looked at before
the buffers take it over; in evaluation the backward pass finds the statistics that the forward pass has used, whatever
has happened to the buffers since.

In channels-last and 2-D inputs torch's kernel adds a channel up in the data's working precision, so that a mean that is
large beside the standard deviation costs the variance its digits. The statistics of the batch, which are in the step of
the copies, tell when that is so; then the call is not torch's to serve, and another backend takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.kernels.activation import activation_called
from batchnorm.kernels.contract import Candidate, Counters, Request, WholeCall
from batchnorm.kernels.native.layout import DTYPES
from batchnorm.kernels.native.library import library
from batchnorm.kernels.plain import ORDINARY
from batchnorm.kernels.running_statistics import commit_if_finite, count_call, keep_finite
from batchnorm.observers import followed, has_dispatch_modes, recorded

__all__ = ["TORCH"]

_Optional: TypeAlias = Tensor | None


class Torch(Candidate):
    """torch.nn.functional.batch_norm: the whole operation at once, without split phases and without a mask."""

    name = "torch"

    def refusal(self, request: Request) -> str | None:
        """Serve every call without a mask."""
        return None if request.mask is None else "torch's own batch_norm takes no mask"

    def serve(self, call: WholeCall, counters: Counters, forced: bool) -> Tensor | None:
        """Call torch's kernel, then its operators for residual and activation, which have been checked.

        In training a channel's step is taken only if it is finite. None where torch's kernel has lost digits.
        """
        input, mean, var, weight, bias, training, momentum, eps, activation, residual, _ = call
        y: Tensor | None
        if training:
            y = _train(input, mean, var, weight, bias, momentum, eps, counters, exact=not forced)
        else:
            if (
                mean is not None
                and var is not None
                and _differentiable(input, weight, bias)
                and not _known_by_buffers()
            ):
                mean, var = mean.clone(), var.clone()
            y = F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)
        return y if y is None or (activation is None and residual is None) else _finish(y, residual, activation)


TORCH = Torch()


def _train(
    input: Tensor,
    running_mean: _Optional,
    running_var: _Optional,
    weight: _Optional,
    bias: _Optional,
    momentum: float,
    eps: float,
    counters: Counters,
    *,
    exact: bool,
) -> Tensor | None:
    known = followed()
    looked_at = exact and not known and _may_lose_digits(input)
    if running_mean is None or running_var is None:
        if running_mean is not running_var:  # of a small input torch's kernel would update the one that there is
            raise ValueError("batch_norm: expected both running statistics or neither")
        if not looked_at:
            y = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        else:
            dtype = torch.float32 if weight is None else weight.dtype
            mean, var = input.new_zeros(2, input.shape[1], dtype=dtype)
            y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
            if _digits_lost(mean, var, torch.zeros_like(mean), torch.zeros_like(var), 1.0):
                return None
        count_call(counters)
        return y
    if not counters.skip_nonfinite and not input.is_cpu:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        count_call(counters)
        return y
    if known and _known_by_buffers():
        old = None if recorded() else (running_mean.clone(), running_var.clone())
        y = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        if old is None:
            count_call(counters)
        else:
            keep_finite(*old, running_mean, running_var, counters)
        return y
    mean, var = running_mean.clone(), running_var.clone()
    y = F.batch_norm(input, mean, var, weight, bias, True, momentum, eps)
    if looked_at and momentum and _digits_lost(mean, var, running_mean, running_var, momentum):
        return None
    commit_if_finite(mean, var, running_mean, running_var, counters, followed=known)
    return y


def _known_by_buffers() -> bool:
    """Whether those who follow the call know the norm by its buffers: an exporter, a dispatch mode."""
    return recorded() or has_dispatch_modes()


_at_once = getattr(library, "digits_lost", None)
_LARGEST_RATIO = 32.0
"""Of mean and standard deviation. Here torch's mean of 4,096 values is off by up to 1e-4 standard deviations, at 10,000
by 0.03, and its variance, which has lost nothing up to 1,000, by 0.1 %."""


def _may_lose_digits(input: Tensor) -> bool:
    return (
        type(input) is Tensor and input.is_cpu and input.dtype is torch.float32 and input.dim() > 1 and len(input) > 0
    )


def _digits_lost(new_mean: Tensor, new_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> bool:
    """Return whether the batch's mean is too large for its variance in a channel, told by the step that it has made."""
    plain = mean.dtype in (torch.float32, torch.float64) and mean.is_contiguous() and var.is_contiguous()
    if _at_once is not None and plain and not (mean.is_neg() or var.is_neg()):
        addresses = (t.data_ptr() for t in (new_mean, new_var, mean, var))
        return bool(_at_once(DTYPES[mean.dtype], mean.numel(), *addresses, momentum, _LARGEST_RATIO))
    with torch.no_grad():
        of_mean, of_var = torch.sub(new_mean, mean, alpha=1 - momentum), torch.sub(new_var, var, alpha=1 - momentum)
        room = torch.addcmul(of_var, of_mean, of_mean, value=-1.0 / (_LARGEST_RATIO**2 * momentum))
        return room.amin().item() < 0.0


def _differentiable(input: Tensor, weight: _Optional, bias: _Optional) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


# Written over their argument: as much as one line each of torch's own.
_INPLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "leaky_relu": F.leaky_relu_,
    "relu6": partial(F.relu6, inplace=True),
}


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Add and activate: over ``y``, which nobody else has, unless somebody watches the operators."""
    alone = type(y) is Tensor and (residual is None or type(residual) in ORDINARY) and not followed()
    if residual is not None:
        y = y.add_(residual) if alone else y + residual
    if activation is None:
        return y
    in_place = _INPLACE.get(activation) if alone else None
    if in_place is not None:
        return in_place(y)
    found = activation_called(activation)
    assert found is not None
    return found.function(y)
