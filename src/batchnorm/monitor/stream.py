"""What has passed by one norm, summed up per channel and per group of samples.

Neighbouring positions of a feature map resemble each other, so the N·H·W values of a channel are not as many
independent ones. The samples of a batch are independent; their positions are not. Everything is therefore reduced to
two numbers per sample and channel, mean and variance over the positions, and the noise of whatever is computed from
them is read off from how they scatter from sample to sample. Samples weigh as much as they have positions (see
:mod:`batchnorm.monitor.weights`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from batchnorm.models.float64 import float64_device
from batchnorm.moments import Moments
from batchnorm.monitor.positions import looked_at
from batchnorm.monitor.samples import sample_statistics, samples_in
from batchnorm.monitor.weights import Met, positions, weights_of

__all__ = ["GROUPS", "PANES", "LayerStream", "ReferenceStatistics", "SampleMoments"]

GROUPS = 16
"""Sample i of a stream falls into group i mod 16, however the stream is cut into batches."""

PANES = 4
"""A window moves on in so many steps, each of one pane of samples."""

_WAITING = 2**16
"""How many means of a layer wait to be summed up together, and as many variances."""


@dataclass(frozen=True)
class ReferenceStatistics:
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
    def of(cls, mean: Tensor, variance: Tensor, eps: float) -> ReferenceStatistics:
        """Return a copy of stored statistics, as they are now."""
        home = float64_device(mean.device)
        mean, variance = (t.detach().reshape(-1).to(home).to(torch.float64, copy=True) for t in (mean, variance))
        return cls(mean, variance, eps)

    @property
    def is_finite(self) -> bool:
        """Whether something can be compared with them in every channel."""
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self.std).all())

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

    Each counts as its weight w_i, the number of positions in some unit: 1 where all maps are of one size.

    .. math::

        \mathrm{count} = \sum_i w_i \qquad \mathrm{mean} = \frac{\sum_i w_i a_i}{\sum_i w_i} \qquad
        M_2 = \sum_i w_i (a_i - \mathrm{mean})^2

    Attributes:
        means: moments of a, one "channel" per pair (group, channel), group-major: shape (G·C,).
        variances: moments of b, likewise.
        squares: moments of a with the weights w², of which standard errors are made; the very object ``means`` where
            all weights are 1.
        groups: G.
    """

    means: Moments
    variances: Moments
    squares: Moments
    groups: int = GROUPS

    @classmethod
    def zero(cls, channels: int, device: torch.device | str | None = None) -> SampleMoments:
        """Return the moments of no sample."""
        empty = Moments.zero(GROUPS * channels, device)
        return cls(empty, empty, empty)

    @classmethod
    def of(cls, a: Tensor, b: Tensor, number: Tensor, weight: Tensor | None = None) -> SampleMoments:
        """Return the moments of some samples.

        A sample that is not finite in a channel does not count there.

        Args:
            a: float64, shape (N, C).
            b: likewise.
            number: which sample of the stream each row belongs to, integers, shape (N,).
            weight: positive, float64, shape (N, C); None for 1.
        """
        finite = torch.isfinite(a) & torch.isfinite(b)
        group, whole = number % GROUPS, bool(finite.all())
        member = torch.nn.functional.one_hot(group, GROUPS).T.double()  # (G, N)

        def moments(values: Tensor, weight: Tensor | None) -> Moments:
            known = finite.double() if weight is None else torch.where(finite, weight, 0.0)
            count = member @ known
            values = values if whole else torch.where(finite, values, 0.0)
            mean = (member @ (values if weight is None else known * values)) / torch.where(count > 0, count, 1.0)
            deviation = values - mean[group]
            if not whole:
                deviation = torch.where(finite, deviation, 0.0)
            squares = deviation.square() if weight is None else known * deviation.square()
            return Moments(count.flatten(), mean.flatten(), (member @ squares).flatten())

        means = moments(a, weight)
        return cls(means, moments(b, weight), means if weight is None else moments(a, weight.square()))

    def merge(self, other: SampleMoments) -> SampleMoments:
        """Return the moments of both sets of samples together."""
        means = self.means.merge(other.means)
        alike = self.squares is self.means and other.squares is other.means
        squares = means if alike else self.squares.merge(other.squares)
        return SampleMoments(means, self.variances.merge(other.variances), squares, self.groups)

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

    def __init__(self, name: str, reference: ReferenceStatistics, window: int | None = None) -> None:
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
        self._memory = self._of_samples(max(2, 2 * _WAITING // max(1, reference.mean.numel())))
        self._used = 0
        self._waiting: list[Met] = []  # in the order of that memory
        self._waiting_at: dict[int, int] = {}  # where, by the number of the first sample
        self._unit = 0.0  # positions of the first sample met, which weighs 1

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
        assert x.shape[1] == self._memory.shape[2]
        rows, is_new = samples_in(x.shape[0], samples), first is None
        with self._lock:
            if mask is not None:  # how many samples it leaves is known only then
                found = sample_statistics(x, mask, samples)
                count = found.shape[1]
                first = self._reserve(count, first)
                room = self._room(count, is_new=is_new).copy_(found)
            else:
                count = rows
                first = self._reserve(count, first)
                room = self._room(count, is_new=is_new)
                sample_statistics(x, None, samples, first, room)
            self._wait(Met(first, room[0], room[1], positions(x, mask, rows, room), count == rows), is_new=is_new)
            self.calls += 1
            self._values += x.shape[0] * looked_at(x.shape)
        return first

    def _wait(self, met: Met, *, is_new: bool) -> None:
        """Let a call wait; pooled with an earlier call of the same forward on the same samples, if that waits still."""
        earlier = None if is_new else self._waiting_at.get(met.first)
        if earlier is not None and self._waiting[earlier].continues(met):
            self._waiting[earlier] = self._waiting[earlier].pooled(met)
            return
        self._waiting_at.setdefault(met.first, len(self._waiting))
        self._waiting.append(met)
        self._used += len(met.mean)

    def _room(self, count: int, *, is_new: bool) -> Tensor:
        """Return where means and variances of so many samples are to be put, (2, count, C); what waits may make room.

        Small batches wait for each other: summing up costs more than they do. Half of the memory is for the calls of a
        forward pass that follow the first, so that as far as possible nothing is summed up between them.
        """
        whole = self._memory.shape[1]
        if self._used + count > (whole // 2 if is_new else whole):
            self._sum_up()
        if self._used + count > whole:
            self._memory = self._of_samples(count)
        return self._memory.narrow(1, self._used, count)

    def _of_samples(self, samples: int) -> Tensor:
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
            self._sum_up()
            panes = [pane for index, pane in self._panes.items() if index >= self._oldest()]
        empty = SampleMoments.zero(self.reference.mean.numel(), self.reference.mean.device)
        return reduce(SampleMoments.merge, (pane.moments for pane in panes), empty)

    @property
    def nonfinite(self) -> int:
        """How many of the samples that count held NaN or infinity in some channel."""
        with self._lock:
            self._sum_up()
            return sum(int(pane.nonfinite) for index, pane in self._panes.items() if index >= self._oldest())

    def _sum_up(self) -> None:
        """Sum up what waits."""
        if not self._used:
            return
        mean, variance = self._memory[:, : self._used]
        home = mean.device
        number = torch.cat([torch.arange(m.first, m.first + len(m.mean), device=home) for m in self._waiting])
        first = self._waiting[0].positions
        self._unit = self._unit or float(first.max() if isinstance(first, Tensor) else first)
        weight = weights_of(self._waiting, self._unit, home)
        self._used = 0
        self._waiting.clear()
        self._waiting_at.clear()
        unit = self.reference.std
        a, b = (mean - self.reference.mean) / unit, variance / unit.square()
        if self._step is None:
            self._put(0, a, b, number, weight)
            return
        pane = number // self._step
        for index in range(max(int(pane.min()), self._oldest()), int(pane.max()) + 1):
            there = pane == index
            if bool(there.any()):
                self._put(index, a[there], b[there], number[there], None if weight is None else weight[there])
        for index in [index for index in self._panes if index < self._oldest()]:
            del self._panes[index]

    def _put(self, index: int, a: Tensor, b: Tensor, number: Tensor, weight: Tensor | None) -> None:
        new = SampleMoments.of(a, b, number, weight)
        nonfinite = (~(torch.isfinite(a) & torch.isfinite(b))).any(1).sum()
        known = self._panes.get(index)
        self._panes[index] = (
            _Pane(new, nonfinite) if known is None else _Pane(known.moments.merge(new), known.nonfinite + nonfinite)
        )
