"""What has passed by one norm, summed up per channel and per group of samples.

Neighbouring positions of a feature map resemble each other, so the N·H·W values of a channel are not as many
independent ones. The samples of a batch are independent; their positions are not. Everything is therefore reduced to
two numbers per sample and channel, mean and variance over the positions, and the noise of whatever is computed from
them is read off from how they scatter from sample to sample.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from batchnorm.graph.rounding import float64_device
from batchnorm.moments import Moments
from batchnorm.monitor.positions import looked_at
from batchnorm.monitor.samples import sample_statistics, samples_in

__all__ = ["GROUPS", "PANES", "LayerStream", "Reference", "SampleMoments"]

GROUPS = 16
"""Sample i of a stream falls into group i mod 16, however the stream is cut into batches."""

PANES = 4
"""A window moves on in so many steps, each of one pane of samples."""

_WAITING = 2**16
"""How many means of a layer wait to be summed up together, and as many variances."""


@dataclass(frozen=True)
class Reference:
    """The statistics that a stream is compared with: float64, shape (C,).

    Attributes:
        mean: μ.
        variance: σ².
        eps: in units of the variance.
        mean_error: standard error of the mean; None where it is not known.
        variance_error: likewise of the variance.
    """

    mean: Tensor
    variance: Tensor
    eps: float
    mean_error: Tensor | None = None
    variance_error: Tensor | None = None

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

        some, group, whole = count.clamp(min=1), number % GROUPS, bool(finite.all())

        def moments(values: Tensor) -> Moments:
            values = values if whole else torch.where(finite, values, 0.0)
            mean = (member @ values) / some
            deviation = values - mean[group]
            if not whole:
                deviation = torch.where(finite, deviation, 0.0)
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
    rows = (t.reshape(groups, -1).unbind(0) for t in (moments.count, moments.mean, moments.m2))
    return [Moments(*each) for each in zip(*rows, strict=True)]


@dataclass(frozen=True)
class _Pane:
    """What a stretch of the stream has shown."""

    moments: SampleMoments
    nonfinite: Tensor


class LayerStream:
    """What one norm has met, all of it or the last so many samples. Several threads may add to it at once.

    Args:
        name: of the norm.
        reference: what the stream is compared with.
        window: how many samples count, the last ones; None for all. They are forgotten a quarter at a time.
    """

    def __init__(self, name: str, reference: Reference, window: int | None = None) -> None:
        self.name = name
        self.reference = reference
        self.calls = 0
        self._step = None if window is None else max(1, window // PANES)
        self._lock = threading.RLock()
        self._total = 0  # samples, each counted once, also where the norm is called several times in one forward
        self._values = 0  # looked at, per channel, masked positions included
        self._panes: dict[int, _Pane] = {}
        # What waits lies in one piece of memory, kept for good. A new piece for each call, amid the buffers that a
        # network takes and gives back, would split these: it would take new memory for them, page fault by page fault.
        self._waiting = self._memory(max(1, _WAITING // reference.mean.numel()))
        self._used = 0
        self._numbers: list[tuple[int, int]] = []  # of the samples that wait: the first, and how many

    def add(
        self, x: Tensor, mask: Tensor | None = None, *, samples: int | None = None, first: int | None = None
    ) -> int:
        """Add the input of one call, and return the number of its first sample.

        Args:
            x: the input.
            mask: True where a position counts.
            samples: how many samples the model was given, where that is known.
            first: what this returned for an earlier call in the same forward, of the same samples; None if there was
                none.
        """
        if x.numel() == 0:
            return self._total if first is None else first
        assert x.shape[1] == self._waiting.shape[2]
        with self._lock:
            if mask is not None:  # how many samples it leaves is known only then
                found = sample_statistics(x, mask, samples)
                count = found.shape[1]
                first = self._reserve(count, first)
                self._room(count).copy_(found)
            else:
                count = samples_in(x.shape[0], samples)
                first = self._reserve(count, first)
                sample_statistics(x, None, samples, first, self._room(count))
            self._used += count
            self._numbers.append((first, count))
            self.calls += 1
            self._values += x.shape[0] * looked_at(x.shape)
        return first

    def _room(self, count: int) -> Tensor:
        """Return where means and variances of so many samples are to be put, (2, count, C); what waits may make room.

        Small batches wait for each other: summing up costs more than they do.
        """
        if self._used + count > self._waiting.shape[1]:
            self._settle()
            if count > self._waiting.shape[1]:
                self._waiting = self._memory(count)
        return self._waiting.narrow(1, self._used, count)

    def _memory(self, samples: int) -> Tensor:
        mean = self.reference.mean
        with torch.inference_mode(False):  # it is written to in any mode
            return torch.empty(2, samples, mean.numel(), dtype=torch.float64, device=mean.device)

    def _reserve(self, count: int, first: int | None) -> int:
        """Return the number of the first of so many samples, which are new or were met before."""
        first = self._total if first is None else first
        self._total = max(self._total, first + count)
        return first

    def _oldest(self) -> int:
        """Return the first pane that counts still."""
        return 0 if self._step is None else max(0, (self._total - 1) // self._step - PANES + 1)

    @property
    def samples(self) -> int:
        """How many samples count."""
        return self._total - self._oldest() * (self._step or 0)

    @property
    def values(self) -> int:
        """How many values of a channel have been looked at, of the samples that count."""
        return self._values if self._step is None else round(self._values * self.samples / max(self._total, 1))

    @property
    def moments(self) -> SampleMoments:
        """The moments of the samples that count."""
        with self._lock:
            self._settle()
            panes = [pane for index, pane in self._panes.items() if index >= self._oldest()]
        empty = SampleMoments.zero(self.reference.mean.numel(), self.reference.mean.device)
        return reduce(SampleMoments.merge, (pane.moments for pane in panes), empty)

    @property
    def nonfinite(self) -> int:
        """How many of the samples that count held NaN or infinity in some channel."""
        with self._lock:
            self._settle()
            return sum(int(pane.nonfinite) for index, pane in self._panes.items() if index >= self._oldest())

    def _settle(self) -> None:
        """Sum up what waits."""
        if not self._used:
            return
        mean, variance = self._waiting[:, : self._used]
        number = torch.cat([torch.arange(first, first + n, device=mean.device) for first, n in self._numbers])
        self._used = 0
        self._numbers.clear()
        unit = self.reference.std
        a, b = (mean - self.reference.mean) / unit, variance / unit.square()
        if self._step is None:
            self._put(0, a, b, number)
            return
        pane = number // self._step
        for index in range(max(int(pane.min()), self._oldest()), int(pane.max()) + 1):
            there = pane == index
            if bool(there.any()):
                self._put(index, a[there], b[there], number[there])
        for index in [index for index in self._panes if index < self._oldest()]:
            del self._panes[index]

    def _put(self, index: int, a: Tensor, b: Tensor, number: Tensor) -> None:
        new = SampleMoments.of(a, b, number)
        nonfinite = (~(torch.isfinite(a) & torch.isfinite(b))).any(1).sum()
        known = self._panes.get(index)
        self._panes[index] = (
            _Pane(new, nonfinite) if known is None else _Pane(known.moments.merge(new), known.nonfinite + nonfinite)
        )
