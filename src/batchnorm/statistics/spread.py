"""How sure measured moments are: standard errors from the spread between groups of batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.moments import Moments

__all__ = ["MOST_GROUPS", "Spread"]

MOST_GROUPS = 64
"""So many groups of batches are told apart at most: then two neighbours at a time become one."""


class Spread:
    r"""Standard errors of a pooled mean and variance, from how far groups of batches are from it.

    With group g holding :math:`m_g` of the n values, mean :math:`\mu_g` and mean squared deviation from the pooled
    mean :math:`v_g = M_{2,g}/m_g + (\mu_g - \mathrm{mean})^2`, pooled :math:`v = M_2/n` (divisor n):

    .. math::

        \mathrm{se}(\mathrm{mean})^2 = \frac{G}{G-1} \sum_g \left(\frac{m_g}{n}\right)^2 (\mu_g - \mathrm{mean})^2
        \qquad
        \mathrm{se}(v)^2 = \frac{G}{G-1} \sum_g \left(\frac{m_g}{n}\right)^2 (v_g - v)^2

    The values of one sample are not independent (neighbouring positions are alike), whole batches are. At first each
    batch is a group; beyond 64 of them neighbours are merged, and new batches fill groups of the new size, so that what
    is kept does not grow with the stream. Samples that come sorted make groups differ, and the errors larger, as they
    should be. Infinite while there are fewer than two groups.

    >>> import torch
    >>> spread = Spread()
    >>> for batch in ([1.0, 3.0], [3.0, 5.0]):
    ...     spread.add(Moments.of(torch.tensor(batch).view(-1, 1)))
    >>> spread.standard_errors()
    (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64))

    Source: Cochran 1977, "Sampling Techniques", section 6.3 (ratio estimates), for the errors; Schmeiser 1982, "Batch
    size effects in the analysis of simulation output", for groups in place of batches.
    """

    def __init__(self, groups: Sequence[Moments] = ()) -> None:
        self._groups = list(groups)
        self._batches_a_group = 1
        self._in_last = 1

    @property
    def groups(self) -> tuple[Moments, ...]:
        """The moments of each group, in the order of the stream."""
        return tuple(self._groups)

    def add(self, batch: Moments, *, same_batch: bool = False) -> None:
        """Take in the next batch, or more values of the last one."""
        if self._groups and (same_batch or self._in_last < self._batches_a_group):
            self._groups[-1] = self._groups[-1].merge(batch)
            self._in_last += not same_batch
            return
        if len(self._groups) == MOST_GROUPS:
            self._groups = [a.merge(b) for a, b in zip(self._groups[::2], self._groups[1::2], strict=True)]
            self._batches_a_group *= 2
        self._groups.append(batch)
        self._in_last = 1

    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Return those of the mean and of the variance, float64, shape (C,)."""
        if not self._groups:
            return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        count = torch.stack([g.count for g in self._groups])
        mean = torch.stack([g.mean for g in self._groups])
        m2 = torch.stack([g.m2 for g in self._groups])
        share = count / count.sum(0).clamp(min=1)
        pooled_mean = (share * mean).sum(0)
        variance = m2 / count.clamp(min=1) + (mean - pooled_mean).square()
        pooled_variance = (share * variance).sum(0)
        number = (count > 0).sum(0)
        factor = torch.where(number > 1, number / (number - 1).clamp(min=1), torch.inf)

        def error(values: Tensor, pooled: Tensor) -> Tensor:
            spread = (share * (values - pooled)).square().sum(0)
            # a constant channel has no error, but one batch says nothing about that either
            return torch.where(number > 1, factor * spread, torch.inf).sqrt()

        return error(mean, pooled_mean), error(variance, pooled_variance)
