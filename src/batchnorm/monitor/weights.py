r"""What a sample weighs beside others of another size: the number of its positions, as in the stored statistics.

Population statistics are over all values of a channel, so that a sample with a map of 32×32 weighs 16 times one of 8×8.
A norm that is called several times in one forward pass, on the levels of a pyramid or step by step, is given more
positions of the same samples: they are pooled, for samples are independent of each other and positions are not. With
:math:`n_j, m_j, v_j` the number of positions, mean and biased variance (divisor n_j) of one sample in call j:

.. math::

    n = n_1 + n_2 \qquad m = m_1 + (m_2 - m_1)\,\tfrac{n_2}{n} \qquad
    v = \tfrac{n_1 v_1 + n_2 v_2}{n} + \tfrac{n_1 n_2}{n^2} (m_2 - m_1)^2

Source: Chan, Golub & LeVeque 1979, eq. 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from batchnorm.moments import expand_mask

__all__ = ["Met", "positions", "weights_of"]

Positions: TypeAlias = "float | Tensor"
"""The same number for every sample and channel, or one for each, float64, (N, C)."""


@dataclass(frozen=True)
class Met:
    """What some samples brought, (N, C) each.

    Attributes:
        first: number of the first of them in the stream.
        mean: of each sample.
        variance: likewise, biased.
        positions: how many values of a channel each sample brought.
        whole: whether these are all samples of their forward pass; a mask may have left some out.
    """

    first: int
    mean: Tensor
    variance: Tensor
    positions: Positions
    whole: bool

    def continues(self, other: Met) -> bool:
        """Return whether both are of the same samples, row by row."""
        return self.whole and other.whole and self.first == other.first and self.mean.shape == other.mean.shape

    def pooled(self, other: Met) -> Met:
        """Return what the same samples brought in both calls together, in the memory that holds this call's."""
        number = self.positions + other.positions
        share = other.positions / number
        off = other.mean - self.mean
        self.variance.add_((other.variance - self.variance) * share).add_(off.square() * (share * (1 - share)))
        self.mean.add_(off * share)
        return replace(self, positions=number)


def positions(x: Tensor, mask: Tensor | None, samples: int, home: Tensor) -> Positions:
    """Return how many values of a channel each sample brings; those without any are left out.

    Args:
        x: the input, (N, C, ...).
        mask: True where a value counts.
        samples: how many samples the rows of ``x`` make.
        home: on whose device.
    """
    rows, channels = x.shape[:2]
    if mask is None:
        return float(prod(x.shape[2:]) * (rows // samples))
    valid = expand_mask(mask, x, 1).reshape(samples, rows // samples, channels, -1)
    count = valid.sum((1, 3))
    return count[(count > 0).all(1)].to(home.device).double()


def weights_of(met: Sequence[Met], unit: float, home: torch.device) -> Tensor | None:
    """Return the weights of all rows in units of so many positions, (N, C); None where all are 1."""
    if all(isinstance(each.positions, float) and each.positions == unit for each in met):
        return None
    rows = [torch.as_tensor(m.positions, dtype=torch.float64, device=home).expand(m.mean.shape) for m in met]
    return torch.cat(rows) / unit
