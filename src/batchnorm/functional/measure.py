"""The moments of a batch, by whichever backend measures it."""

from __future__ import annotations

from functools import reduce
from itertools import repeat

from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.functional.dispatch import choose_split
from batchnorm.functional.validation import check_extras
from batchnorm.kernels.contract import Request
from batchnorm.kernels.reference import REFERENCE
from batchnorm.moments import Moments, expand_mask

__all__ = ["moments", "moments_of"]

_CHUNK = 1 << 20
"""How many values are turned into float64 at a time: 8 MiB, whatever the size of the batch."""


def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    r"""Return the count, mean and M2 of every channel: what a batch adds to the statistics of a population.

    .. math::

        \mathrm{mean} = \frac1n \sum_i x_i \qquad M_2 = \sum_i (x_i - \mathrm{mean})^2

    Args:
        x: shape (N, C) or (N, C, \*space), any memory layout, floating point.
        mask: bool, True where a position is valid; shape (N, \*space), or one that broadcasts to the input's.

    Returns:
        Moments in float64, shape (C,), without gradients; M2 has no divisor, see
        :meth:`~batchnorm.moments.Moments.variance`. Two batches' moments add up with ``+``.

    Raises:
        InputError: x has fewer than 2 dimensions or is not floating point; the mask is not boolean or elsewhere.
        ShapeError: the mask does not fit.

    Example:
        >>> import torch
        >>> from batchnorm.functional import moments
        >>> moments(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        Moments(count=[2.0, 2.0], mean=[2.0, 10.0], m2=[2.0, 0.0])
    """
    check_extras("moments", x, None, None, mask)
    if x.dim() < 2:
        raise InputError(f"moments: expected an input of shape (N, C) or (N, C, *space); got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise InputError(f"moments: expected a floating-point input; got {x.dtype}. Convert it with x.float().")
    return moments_of(x, mask, any_size=False)


def moments_of(x: Tensor, mask: Tensor | None, *, any_size: bool = True) -> Moments:
    """Return the same of a tensor that has been checked, by the backend that dispatch chooses.

    The reference computes in float64: it takes a few samples at a time. For ``any_size`` see
    :func:`batchnorm.functional.dispatch.choose_split`.
    """
    backend = choose_split(Request(x, training=True, mask=mask), any_size=any_size)
    x, full = x.detach(), None if mask is None else expand_mask(mask, x, 1)
    if backend is not REFERENCE or x.numel() <= _CHUNK:
        return backend.moments(x, full)
    samples = max(1, _CHUNK * len(x) // x.numel())
    masks = repeat(None) if full is None else full.split(samples)
    parts = (backend.moments(part, part_mask) for part, part_mask in zip(x.split(samples), masks, strict=False))
    return reduce(Moments.merge, parts)
