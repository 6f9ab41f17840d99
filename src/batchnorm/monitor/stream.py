"""What has passed by one norm, summed up per channel and per group of samples.

Neighbouring positions of a feature map resemble each other, so the N·H·W values of a channel are not as many
independent ones. The samples of a batch are independent; their positions are not. Everything is therefore reduced to
two numbers per sample and channel, mean and variance over the positions, and the noise of whatever is computed from
them is read off from how they scatter from sample to sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.graph.rounding import float64_device
from batchnorm.moments import Moments, expand_mask

__all__ = ["GROUPS", "LayerStream", "Reference", "SampleMoments", "sample_statistics"]

GROUPS = 16
"""Sample i of a stream falls into group i mod 16, however the stream is cut into batches."""

_WAITING = 2**17
"""How many numbers of a layer wait to be summed up together."""


@dataclass(frozen=True)
class Reference:
    """The stored statistics that a stream is compared with: float64, shape (C,); ``eps`` in units of the variance."""

    mean: Tensor
    variance: Tensor
    eps: float

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, eps: float) -> Reference:
        """Return a copy of stored statistics, as they are now."""
        home = float64_device(mean.device)
        mean, variance = (t.detach().reshape(-1).to(home).to(torch.float64, copy=True) for t in (mean, variance))
        return cls(mean, variance, eps)

    @property
    def std(self) -> Tensor:
        """The unit of every shift: √(variance + eps), what the norm divides by."""
        return (self.variance + self.eps).sqrt()


@dataclass(frozen=True)
class SampleMoments:
    r"""Moments over samples of each sample's own mean and variance, by group, in units of the stored statistics.

    For sample i, with m_i and v_i its mean and its biased variance (divisor: its number of positions) in one channel,
    and μ, σ² + ε what is stored:

    .. math::

        a_i = \frac{m_i - \mu}{\sqrt{\sigma^2 + \epsilon}} \qquad b_i = \frac{v_i}{\sigma^2 + \epsilon}

    Attributes:
        means: moments of a, one "channel" per pair (group, channel), group-major: shape (G·C,).
        variances: moments of b, likewise.
        groups: G.
    """

    means: Moments
    variances: Moments
    groups: int = GROUPS

    @classmethod
    def zero(cls, channels: int, device: torch.device | str | None = None) -> SampleMoments:
        """Return the moments of no sample."""
        empty = Moments.zero(GROUPS * channels, device)
        return cls(empty, empty)

    @classmethod
    def of(cls, a: Tensor, b: Tensor, number: Tensor) -> SampleMoments:
        """Return the moments of some samples.

        A sample that is not finite in a channel does not count there.

        Args:
            a: float64, shape (N, C).
            b: likewise.
            number: which sample of the stream each row belongs to, integers, shape (N,).
        """
        finite = torch.isfinite(a) & torch.isfinite(b)
        member = torch.nn.functional.one_hot(number % GROUPS, GROUPS).T.double()  # (G, N)
        count = member @ finite.double()

        def moments(values: Tensor) -> Moments:
            values = torch.where(finite, values, 0.0)
            mean = (member @ values) / count.clamp(min=1)
            deviation = torch.where(finite, values - mean[number % GROUPS], 0.0)
            return Moments(count.flatten(), mean.flatten(), (member @ deviation.square()).flatten())

        return cls(moments(a), moments(b))

    def merge(self, other: SampleMoments) -> SampleMoments:
        """Return the moments of both sets of samples together."""
        return SampleMoments(self.means.merge(other.means), self.variances.merge(other.variances), self.groups)

    __add__ = merge

    def by_group(self) -> list[tuple[Moments, Moments]]:
        """Return (moments of a, moments of b) of each group, shape (C,) each."""
        return list(zip(_split(self.means, self.groups), _split(self.variances, self.groups), strict=True))


def _split(moments: Moments, groups: int) -> list[Moments]:
    parts = (t.reshape(groups, -1).unbind(0) for t in (moments.count, moments.mean, moments.m2))
    return [Moments(*each) for each in zip(*parts, strict=True)]


def sample_statistics(x: Tensor, mask: Tensor | None = None, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each sample in each channel: float64, shape (N, C).

    Two passes, so that a mean far above the spread costs no digits. A variance of single values is 0.

    Args:
        x: (N, C) or (N, C, *space), floating point, not empty.
        mask: True where a position counts; samples without such a position are left out.
        samples: how many samples the rows of ``x`` stem from, if fewer than rows: a model may fold time steps or boxes
            into the first dimension, sample by sample, and rows of one sample are no more independent than positions.
    """
    x = x.detach()
    home = float64_device(x.device)
    if x.dtype.itemsize < 4:
        x = x.float()
    rows, channels = x.shape[:2]
    groups = samples if samples and rows > samples and rows % samples == 0 else rows
    if x.dim() == 2 and groups == rows and mask is None:
        values = x.to(home).double()
        return values, torch.zeros_like(values)
    shape = (groups, rows // groups, channels, -1)
    space = x.reshape(shape)
    if mask is None:
        mean = space.mean((1, 3), keepdim=True)
        variance = (space - mean).square_().mean((1, 3))
        return mean.reshape(groups, channels).to(home).double(), variance.to(home).double()
    valid = expand_mask(mask, x, 1).reshape(shape)
    count = valid.sum((1, 3), keepdim=True)
    mean = torch.where(valid, space, 0.0).sum((1, 3), keepdim=True) / count
    variance = torch.where(valid, space - mean, 0.0).square_().sum((1, 3), keepdim=True) / count
    seen = (count > 0).reshape(groups, channels).all(1)
    mean, variance = (t.reshape(groups, channels)[seen].to(home).double() for t in (mean, variance))
    return mean, variance


class LayerStream:
    """Everything that one norm has met since the watch began."""

    def __init__(self, name: str, reference: Reference) -> None:
        self.name = name
        self.reference = reference
        self.samples = 0  # each counted once, also where the norm is called several times in one forward
        self.calls = 0
        self.values = 0  # per channel, masked positions included
        self._moments = SampleMoments.zero(reference.mean.numel(), reference.mean.device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=reference.mean.device)
        self._first = 0
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, mask: Tensor | None = None, *, samples: int | None = None, again: bool = False) -> None:
        """Add the input of one call.

        Args:
            x: the input.
            mask: True where a position counts.
            samples: how many samples the model was given, where that is known.
            again: this forward has called the norm before, so these are the same samples once more.
        """
        if x.numel() == 0:
            return
        mean, variance = sample_statistics(x, mask, samples)
        home = self.reference.mean.device
        self._first = self._first if again else self.samples
        number = torch.arange(self._first, self._first + len(mean), device=home)
        self._waiting.append((mean.to(home), variance.to(home), number))
        self.calls += 1
        self.values += x.numel() // x.shape[1]
        self.samples = max(self.samples, self._first + len(mean))
        if sum(part[0].numel() for part in self._waiting) > _WAITING:
            self._settle()

    @property
    def moments(self) -> SampleMoments:
        """The moments of all samples so far."""
        self._settle()
        return self._moments

    @property
    def nonfinite(self) -> int:
        """How many samples held NaN or infinity in some channel."""
        self._settle()
        return int(self._nonfinite)

    def _settle(self) -> None:
        """Sum up what waits. Small batches wait for each other: summing up costs more than they do."""
        if not self._waiting:
            return
        mean, variance, number = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        unit = self.reference.std
        a, b = (mean - self.reference.mean) / unit, variance / unit.square()
        self._moments = self._moments + SampleMoments.of(a, b, number)
        self._nonfinite = self._nonfinite + (~(torch.isfinite(a) & torch.isfinite(b))).any(1).sum()
