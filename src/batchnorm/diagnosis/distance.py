r"""How far two means and variances are apart, channel by channel, in units in which 1 is a whole standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl", "layer_distance", "squared_distance", "typical"]

_LARGEST = 9.0
"""One channel counts for at most so much: three standard deviations."""


def squared_distance(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor, eps: float) -> Tensor:
    r"""Return :math:`\delta^2 + \lambda^2` of each channel, (C,), each term at most 9.

    .. math::

        \delta = \frac{\mu - \mu'}{\sqrt{\tfrac12 (v + v') + \epsilon}} \qquad
        \lambda = \tfrac12 \log \frac{v + \epsilon}{v' + \epsilon}

    For close distributions both are errors of a norm's output: its shift in standard deviations, and the relative error
    of its scale. Symmetric, and infinite where a number is not finite or a variance is negative by more than ε.
    """
    broken = ~(torch.isfinite(mean) & torch.isfinite(other_mean) & (variance + eps > 0) & (other_variance + eps > 0))
    broken |= ~(torch.isfinite(variance) & torch.isfinite(other_variance))
    shift = (mean - other_mean).square() / ((variance + other_variance) / 2 + eps)
    scale = 0.25 * ((variance + eps) / (other_variance + eps)).log().square()
    both = shift.clamp(max=_LARGEST) + scale.clamp(max=_LARGEST)
    return torch.where(broken, torch.inf, both)


def typical(squared: Tensor) -> float:
    """Return the root of the mean over the channels."""
    return float(squared.mean().clamp(min=0).sqrt()) if squared.numel() else 0.0


def layer_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], eps: float) -> float:
    """Return the distance of the typical channel between two pairs of mean and variance."""
    return typical(squared_distance(*a, *b, eps))


def kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor, eps: float) -> Tensor:
    r"""Return the symmetric Kullback–Leibler divergence of two normal distributions, (C,), in nats.

    .. math::

        \tfrac12 \left[ \frac{v}{v'} + \frac{v'}{v} - 2 + (\mu - \mu')^2 \left(\frac1v + \frac1{v'}\right) \right]

    with ε added to each variance. (Kullback & Leibler 1951, section 2: the divergence J(1, 2).)

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> kl(zero, one, one, one, 0.0)
    tensor([1.])
    """
    v, w = variance + eps, other_variance + eps
    return 0.5 * (v / w + w / v - 2 + (mean - other_mean).square() * (1 / v + 1 / w))
