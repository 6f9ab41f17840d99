"""How sure measured moments are: standard errors from the spread between groups of batches."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.statistics.parts import Parts

__all__ = ["MOST_GROUPS", "Spread", "errors_of"]

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
    batch is a group; beyond 64 of them neighbours are merged, and groups hold twice as many from then on, so that what
    is kept does not grow with the stream. Samples that come sorted make groups differ, and the errors larger, as they
    should be. Infinite while there are fewer than two groups.

    >>> import torch
    >>> spread = Spread()
    >>> for index, batch in enumerate(([1.0, 3.0], [3.0, 5.0])):
    ...     spread.add(Moments.of(torch.tensor(batch).view(-1, 1)), index)
    >>> spread.standard_errors()
    (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64))

    Source: Cochran 1977, "Sampling Techniques", section 6.3 (ratio estimates), for the errors; Schmeiser 1982, "Batch
    size effects in the analysis of simulation output", for groups in place of batches.
    """

    def __init__(self) -> None:
        self._groups: dict[int, Moments] = {}  # by the index of their first batch over the number of batches in a group
        self._batches_a_group = 1

    @property
    def groups(self) -> tuple[Moments, ...]:
        """The moments of each group, in the order of the stream."""
        return tuple(self._groups[key] for key in sorted(self._groups))

    def add(self, moments: Moments, batch: int) -> None:
        """Take in what was met in the batch of that index; several times, and in any order, if it came so."""
        self._put(batch // self._batches_a_group, moments)
        self._bound()

    def add_parts(self, batches: Parts, first: int) -> None:
        """Take in what was met in many batches that follow each other; ``first`` is the index of the first of them."""
        start = 0
        while start < len(batches):
            key = (first + start) // self._batches_a_group
            end = min((key + 1) * self._batches_a_group - first, len(batches))
            self._put(key, batches.together(start, end))
            self._bound()
            start = end

    def _bound(self) -> None:
        while len(self._groups) > MOST_GROUPS:
            self._batches_a_group *= 2
            groups, self._groups = self._groups, {}
            for key in sorted(groups):
                self._put(key // 2, groups[key])

    def _put(self, key: int, moments: Moments) -> None:
        known = self._groups.get(key)
        self._groups[key] = moments if known is None else known.merge(moments)

    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Return those of the mean and of the variance, float64, shape (C,)."""
        if not self._groups:
            nothing = torch.empty(0, dtype=torch.float64, device="cpu")
            return nothing, nothing
        return errors_of(self.deviations(reduce(Moments.merge, self.groups)))

    def deviations(self, pooled: Moments) -> Tensor:
        """Return per channel the number of groups, and the two sums above, (3, C).

        Args:
            pooled: the moments of everything, which may be more than these groups: those of other processes, whose
                deviations are then added to these.
        """
        if not self._groups:
            return torch.zeros(3, pooled.num_features, dtype=torch.float64, device=pooled.count.device)
        groups = self.groups
        count = torch.stack([g.count for g in groups])
        share = count / pooled.count.clamp(min=1)
        distance = torch.stack([g.mean for g in groups]) - pooled.mean
        squares = torch.stack([g.m2 for g in groups]) / count.clamp(min=1) + distance.square()
        of_mean = (share * distance).square().sum(0)
        of_variance = (share * (squares - pooled.variance().nan_to_num())).square().sum(0)
        return torch.stack([(count > 0).sum(0).double(), of_mean, of_variance])


def errors_of(deviations: Tensor) -> tuple[Tensor, Tensor]:
    """Return the standard errors of mean and variance, from what :meth:`Spread.deviations` returned."""
    number, *sums = deviations
    factor = number / (number - 1).clamp(min=1)
    # a constant channel has no error, but a single group says nothing about that either
    mean, variance = (torch.where(number > 1, factor * total, torch.inf).sqrt() for total in sums)
    return mean, variance
