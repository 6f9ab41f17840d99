"""Running statistics that cannot be poisoned: a step that is not finite is not taken, and is counted.

One infinity in a batch makes the batch's mean or variance infinite or NaN, and every later
r ← (1 − momentum)·r + momentum·b is so too. The steps of all paths end here (the native kernels hold to the same rule
inside their loop): a channel takes its new values only if both are finite, else it keeps the old ones bit for bit.
Nothing here asks a device for a value, so nothing waits for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.contract import NO_COUNTERS, Counters
from batchnorm.kernels.native.layout import DTYPES
from batchnorm.kernels.native.library import library
from batchnorm.kernels.plain import takes_steps
from batchnorm.moments import Moments
from batchnorm.observers import transformed

__all__ = ["commit_if_finite", "count_call", "keep_finite", "update_running"]


def update_running(
    mean: Tensor, var: Tensor, moments: Moments, momentum: float | Tensor, counters: Counters = NO_COUNTERS
) -> None:
    """Move running statistics by r ← (1 − momentum)·r + momentum·b, in place, b being mean and variance of ``moments``.

    The variance is the unbiased one, with divisor n − 1; channels of fewer than 2 values have none and stay as they
    are. The arithmetic is float64, rounded once.
    """
    with torch.no_grad():
        defined = (moments.count > 1).reshape(mean.shape)

        def stepped(running: Tensor, batch: Tensor) -> Tensor:
            old = running.double()
            new = (1 - momentum) * old + momentum * batch.reshape(running.shape)
            return torch.where(defined, new, old).to(running.dtype)

        new_mean, new_var = stepped(mean, moments.mean), stepped(var, moments.variance(correction=1))
        _commit(new_mean, new_var, mean, var, counters, _finite(new_mean, new_var), ~defined)


def commit_if_finite(
    new_mean: Tensor, new_var: Tensor, mean: Tensor, var: Tensor, counters: Counters, *, followed: bool
) -> None:
    """Copy new running statistics into the buffers, except in channels where one of the two is not finite.

    Args:
        new_mean: contiguous.
        new_var: likewise.
        mean: the buffer.
        var: likewise.
        counters: of the layer.
        followed: whether torch follows the operators, so that nothing may be done but by them.
    """
    if followed:
        with torch.no_grad():
            _commit(new_mean, new_var, mean, var, counters, _finite(new_mean, new_var))
        return
    if library is None or not takes_steps(mean, var, counters):
        with torch.no_grad():
            finite = _finite_in_three(new_mean, new_var)
            torch.where(finite, new_mean, mean, out=mean)
            torch.where(finite, new_var, var, out=var)
            _count(counters, finite)
        return
    batches, refused, _ = counters
    library.take_finite(
        DTYPES[mean.dtype],
        mean.numel(),
        new_mean.data_ptr(),
        new_var.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        0 if batches is None else batches.data_ptr(),
        0 if refused is None else refused.data_ptr(),
    )
    # An earlier call, of whatever kind of norm, may have kept the buffers for its backward pass: autograd has to know.
    torch.autograd.graph.increment_version([mean, var] if batches is None else [mean, var, batches])


def keep_finite(old_mean: Tensor, old_var: Tensor, mean: Tensor, var: Tensor, counters: Counters) -> None:
    """Give the buffers their old values back in channels where one of the new ones is not finite.

    Torch's kernel has written the new ones unseen by autograd, and has kept the buffers for its backward pass, which
    would fail on a write that shows: hence ``data``.
    """
    with torch.no_grad():
        finite = _finite_in_three(mean, var)
        torch.where(finite, mean, old_mean, out=mean.data)
        torch.where(finite, var, old_var, out=var.data)
        _count(counters, finite)


def count_call(counters: Counters) -> None:
    """Count a batch where there are no running statistics that it could enter, or nobody looks whether it does."""
    if counters.batches is not None:
        counters.batches.add_(1)


def _commit(
    new_mean: Tensor,
    new_var: Tensor,
    mean: Tensor,
    var: Tensor,
    counters: Counters,
    finite: Tensor,
    excused: Tensor | None = None,
) -> None:
    mean.copy_(torch.where(finite, new_mean, mean))
    var.copy_(torch.where(finite, new_var, var))
    _count(counters, finite if excused is None else finite | excused)


def _finite(mean: Tensor, var: Tensor) -> Tensor:
    return torch.isfinite(mean) & torch.isfinite(var)


def _finite_in_three(mean: Tensor, var: Tensor) -> Tensor:
    """Return the same in three operators, not nine: else x · 0 is NaN. A compiler would take it for 0."""
    return mean * 0 == var * 0


def _count(counters: Counters, finite: Tensor) -> None:
    if not torch.compiler.is_compiling() and transformed():
        count_call(counters)  # the flags may be of a whole ensemble, which one counter cannot hold
        return
    if counters.batches is None and counters.refused is None:
        return
    entered = finite.all()
    if counters.batches is not None:
        counters.batches.add_(entered)
    if counters.refused is not None:
        counters.refused.add_(~entered)
