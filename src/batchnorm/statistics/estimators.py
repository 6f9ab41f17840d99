"""Which number is called the population mean and variance: one small class for each answer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.statistics.parts import Parts

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ESTIMATORS", "Estimator", "Pooled", "Within"]


class Estimator(ABC):
    """Adds up the moments of one batch after another, in float64.

    Attributes:
        pooled: the moments of every value so far.
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None) -> None:
        self.pooled = Moments.zero(num_features, device)

    def add(self, batch: Moments) -> None:
        """Take in one batch."""
        self.pooled = self.pooled.merge(batch)

    def add_parts(self, batches: Parts) -> None:
        """Take in many batches."""
        self.pooled = self.pooled.merge(batches.together())

    def merge(self, other: Self) -> Self:
        """Return what both have taken in, together: the batches of this one first."""
        both = copy.copy(self)
        both.pooled = self.pooled.merge(other.pooled)
        return both

    def to(self, device: torch.device | str) -> Self:
        """Return the same on another device."""
        moved = copy.copy(self)
        moved.pooled = self.pooled.to(device)
        return moved

    @abstractmethod
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance, float64, shape (C,); NaN in channels that have met too little to tell."""


class Pooled(Estimator):
    r"""The exact moments of all values together, whatever batches they came in.

    .. math::

        \mathrm{mean} = \frac1n \sum_i x_i \qquad
        \mathrm{variance} = \frac{M_2}{n-1} = \frac1{n-1} \sum_i (x_i - \mathrm{mean})^2

    over all n values of a channel: unbiased (divisor n − 1), as PyTorch keeps it in ``running_var``.

    >>> import torch
    >>> estimator = Pooled(1)
    >>> for batch in ([1.0, 2.0], [6.0]):
    ...     estimator.add(Moments.of(torch.tensor(batch).view(-1, 1)))
    >>> estimator.statistics()
    (tensor([3.], dtype=torch.float64), tensor([7.], dtype=torch.float64))
    """

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance (divisor n − 1); NaN where n < 2."""
        mean = torch.where(self.pooled.count > 1, self.pooled.mean, torch.nan)
        return mean, self.pooled.variance(correction=1)


class Within(Estimator):
    r"""The paper's estimate: averages over batches, each batch counting the same.

    .. math::

        \mathrm{mean} = E_B[\mu_B] \qquad
        \mathrm{variance} = E_B\!\left[\tfrac{m}{m-1}\,\sigma_B^2\right]

    with σ²_B biased (divisor m), so that each term is the batch's unbiased variance (divisor m − 1). For batches of one
    size m this is m/(m−1) · E_B[σ²_B]. It leaves out the variance *between* the batch means, and a small last batch
    weighs as much as a full one. A batch with a single value in a channel has no variance; it enters neither average
    of that channel. (Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2, step 10.)

    >>> import torch
    >>> estimator = Within(1)
    >>> for batch in ([1.0, 2.0], [5.0, 8.0], [100.0]):
    ...     estimator.add(Moments.of(torch.tensor(batch).view(-1, 1)))
    >>> estimator.statistics()
    (tensor([4.], dtype=torch.float64), tensor([2.5000], dtype=torch.float64))
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(num_features, device)
        self._batches, self._mean, self._variance = (self.pooled.count.clone() for _ in range(3))

    def add(self, batch: Moments) -> None:
        """Take in one batch; the channels of which it has at least two values."""
        super().add(batch)
        enters = batch.count > 1
        self._batches = self._batches + enters
        weight = enters / self._batches.clamp(min=1)
        variance = torch.where(enters, batch.variance(correction=1), 0.0)
        self._mean = self._mean + (batch.mean - self._mean) * weight
        self._variance = self._variance + (variance - self._variance) * weight

    def add_parts(self, batches: Parts) -> None:
        """Take in many batches, unless they have a single value per channel."""
        super().add_parts(batches)
        if batches.count < 2:
            return
        self._batches = self._batches + len(batches)
        weight = len(batches) / self._batches
        variance = (batches.m2 / (batches.count - 1)).mean(0)
        self._mean = self._mean + (batches.mean.mean(0) - self._mean) * weight
        self._variance = self._variance + (variance - self._variance) * weight

    def merge(self, other: Self) -> Self:
        """Return the averages over the batches of both."""
        both = super().merge(other)
        both._batches = self._batches + other._batches
        weight = other._batches / both._batches.clamp(min=1)
        both._mean = self._mean + (other._mean - self._mean) * weight
        both._variance = self._variance + (other._variance - self._variance) * weight
        return both

    def to(self, device: torch.device | str) -> Self:
        """Return the same on another device."""
        moved = super().to(device)
        moved._batches, moved._mean, moved._variance = (
            t.to(device) for t in (self._batches, self._mean, self._variance)
        )
        return moved

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return both averages; NaN where no batch had two values."""
        met = self._batches > 0
        return torch.where(met, self._mean, torch.nan), torch.where(met, self._variance, torch.nan)


ESTIMATORS: dict[str, type[Estimator]] = {"pooled": Pooled, "within": Within}
