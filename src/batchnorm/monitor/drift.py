"""How far a stream is from the stored statistics, and whether that is more than chance and more than a trifle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from batchnorm.monitor.stream import LayerStream, ReferenceStatistics, SampleMoments
from batchnorm.monitor.student import critical_t

__all__ = ["MIN_SAMPLES", "REFERENCE_SAMPLES", "ChannelDrift", "LayerDrift", "Status", "judge"]

MIN_SAMPLES = 16
"""Fewer samples than groups leave the noise itself unknown: nothing is said about drift then."""

REFERENCE_SAMPLES = 608
"""Stored statistics are taken to be as noisy as those of so many samples: a moving average with momentum 0.1 has the
variance of a mean over (2 − 0.1)/0.1 = 19 batches, here of 32."""

_CONSTANT = 1e-12
"""A variance met below this share of the stored one is rounding."""

Status: TypeAlias = Literal[
    "as stored", "drifted", "non-finite values", "non-finite statistics", "too few samples", "not called"
]


@dataclass(frozen=True)
class ChannelDrift:
    """One channel: mean shift in stored standard deviations and in standard errors, and the variance ratio."""

    channel: int
    shift: float
    standard_errors: float
    variance_ratio: float


@dataclass(frozen=True)
class LayerDrift:
    r"""What one norm met, beside what it has stored.

    Attributes:
        name: of the norm.
        status: the verdict in words.
        samples: number of independent samples seen.
        nonfinite: how many samples held NaN or infinity somewhere; they count in no moment of their channel. Not known,
            and 0, where the statistics that they are compared with are not finite.
        effective: number of independent values that would give the mean of a channel the same standard error, median
            over the channels: between the number of samples (positions all alike) and of values (all independent).
        distance: √(mean over channels of d² + (√r − 1)²), corrected for the noise of stream and store.
        bound: what of the distance chance cannot explain, its lower confidence bound.
        detectable: about the smallest distance that this stream would have been flagged for.
        shift: d, mean shift of each channel in stored standard deviations, float64, shape (C,).
        standard_errors: the same in standard errors of the difference.
        variance_ratio: r, unbiased variance met over variance stored (each plus eps), float64, shape (C,).
    """

    name: str
    status: Status
    samples: int
    nonfinite: int
    effective: float | None
    distance: float | None
    bound: float | None
    detectable: float | None
    shift: Tensor
    standard_errors: Tensor
    variance_ratio: Tensor

    @property
    def flagged(self) -> bool:
        """Whether the layer is flagged: for a distance beyond the tolerance, or for values that are not finite.

        That it is not says nothing by itself: see :attr:`status` for whether it could be judged.
        """
        return self.status in ("drifted", "non-finite values")

    def worst(self, count: int = 3) -> list[ChannelDrift]:
        """Return the channels that contribute most to the distance, the worst first."""
        size = _squared_distance(self.shift, self.variance_ratio).nan_to_num(nan=-1.0, posinf=math.inf)
        order = [int(c) for c in size.argsort(descending=True, stable=True)[:count] if size[c] >= 0]
        return [
            ChannelDrift(c, float(self.shift[c]), float(self.standard_errors[c]), float(self.variance_ratio[c]))
            for c in order
        ]


def judge(stream: LayerStream, *, tolerance: float, level: float) -> LayerDrift:
    r"""Compare what a stream met with what is stored.

    Per channel, with M and s² the mean and the unbiased variance met, over all values, so that samples weigh as much as
    they have positions, μ and σ² the stored ones (the divisor of σ² is that of whoever stored it; PyTorch's is m − 1):

    .. math::

        d = \frac{M - \mu}{\sqrt{\sigma^2 + \epsilon}} \qquad r = \frac{s^2 + \epsilon}{\sigma^2 + \epsilon} \qquad
        D^2 = \frac1C \sum_c d_c^2 + (\sqrt{r_c} - 1)^2

    D² is the squared Fréchet (2-Wasserstein) distance between the normal distributions N(M, s²) and N(μ, σ²), in units
    of the stored variance, averaged over channels: how many stored standard deviations the typical channel is off.

    **Noise.** From a finite stream D² comes out too large by the variance of d and √r, and by an amount that scatters.
    Both are estimated by the jackknife over 16 groups of samples: D² is computed anew without each group in turn, which
    gives the bias b and the standard error e whatever the correlation between positions and between channels. M and s²
    are ratios of sums over samples, for which the jackknife holds also where samples differ in size; all calls of a
    norm in one forward pass are of the same samples, and in the same group. Stored statistics are estimates too; theirs
    is taken to be the noise of 608 samples, b′ = b·n/608. A population knows its own standard errors: b′ is then the
    mean over channels of se(μ)²/(σ² + ε) + (se(σ²)/(2(σ² + ε)))².

    .. math::

        \hat D^2 = D^2 - b - b' \qquad \text{bound}^2 = \hat D^2 - t\,e

    The layer has drifted if the bound exceeds the tolerance: a test of the hypothesis "the distance is at most the
    tolerance" at the given level. It is one test a layer, not one a channel, so that the number of channels does not
    multiply false alarms; the caller divides the level by the number of layers.

    A channel that did not vary at all counts with its shift only, unless none varied.

    Args:
        stream: what one norm has met.
        tolerance: the distance that is no drift, in stored standard deviations.
        level: probability of a false alarm.

    Sources: Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; Heusel et al. 2017
    (arXiv 1706.08500), which compares features by it; Efron & Tibshirani 1993, "An Introduction to the Bootstrap",
    ch. 11 (jackknife).
    """
    moments, reference = stream.moments, stream.reference
    subsets, filled = _subsets(moments)
    shift, ratio = (rows[0] for rows in _channels(subsets, reference))
    errors, effective = _standard_errors(stream, moments, subsets, ratio)
    nonfinite = stream.nonfinite
    distance = bound = detectable = None
    status: Status = "not called" if stream.calls == 0 else "too few samples"
    if filled >= MIN_SAMPLES:
        squared, error = _jackknife(subsets, reference, stream.samples)
        margin = critical_t(level, filled - 1) * error
        distance, bound = _root(squared), _root(squared - margin)
        detectable = math.sqrt(tolerance**2 + margin)
        status = "drifted" if bound > tolerance else "as stored"
    else:
        effective = None  # an estimate from so few would be anything
    if nonfinite or (distance is not None and not math.isfinite(distance)):  # values beyond 1e150 overflow D²
        status = "non-finite values"
    if not reference.is_finite:  # nothing is told of the data: whatever it is, the difference is NaN
        status, nonfinite, distance, bound, detectable = "non-finite statistics", 0, None, None, None
    return LayerDrift(
        stream.name,
        status,
        stream.samples,
        nonfinite,
        effective,
        distance,
        bound,
        detectable,
        shift.cpu(),
        errors.cpu(),
        ratio.cpu(),
    )


@dataclass(frozen=True)
class _Subsets:
    """Moments over samples, first of all of them, then of all but each group's: one row a subset, shape (1 + G, C)."""

    count: Tensor  # sum of the weights
    shift: Tensor  # mean of a
    between: Tensor  # its unbiased variance
    within: Tensor  # mean of b


def _subsets(moments: SampleMoments) -> tuple[_Subsets, int]:
    """Return the moments of all samples and of all but each group's, and how many groups hold any."""
    count, mean, m2 = (
        t.reshape(moments.groups, -1) for t in (moments.means.count, moments.means.mean, moments.means.m2)
    )
    within = moments.variances.mean.reshape(moments.groups, -1)
    filled = (count > 0).any(1)
    groups = moments.groups
    member = (
        torch.cat([torch.ones(1, groups, device="cpu"), 1 - torch.eye(groups, device="cpu")[filled.cpu()]])
        .double()
        .to(count.device)
    )
    total = member @ count
    # about the mean of everything, so that what is subtracted below is small
    center = (count * mean).sum(0) / torch.where(count.sum(0) > 0, count.sum(0), 1.0)
    off = torch.where(count > 0, mean - center, 0.0)
    some = torch.where(total > 0, total, 1.0)
    inside = (member @ (count * off)) / some
    squares = member @ (m2 + count * off.square()) - total * inside.square()
    # Σw − Σw²/Σw, which is n − 1 where all weights are 1; 0 but for rounding where there is one sample
    divisor = total - (member @ moments.squares.count.reshape(groups, -1)) / some
    between = torch.where(divisor > 1e-9 * total, squares.clamp(min=0) / divisor, torch.nan)
    shift = torch.where(total > 0, center + inside, torch.nan)
    return _Subsets(total, shift, between, (member @ (count * within)) / some), int(filled.sum())


def _channels(subsets: _Subsets, reference: ReferenceStatistics) -> tuple[Tensor, Tensor]:
    """Return d and r, one row a subset; NaN where samples are missing."""
    # Within + between: E[b] + Var[a] is the variance of one value, whatever the correlation inside a sample.
    ratio = (subsets.within + subsets.between) + reference.eps / reference.std.square()
    return subsets.shift, ratio


def _standard_errors(
    stream: LayerStream, moments: SampleMoments, subsets: _Subsets, ratio: Tensor
) -> tuple[Tensor, float | None]:
    r"""Return d in standard errors, per channel, and the median number of independent values behind a channel's mean.

    .. math::

        \operatorname{Var}[d] = \frac{u}{n} \qquad n = \frac{(\sum w)^2}{\sum w^2} \qquad
        u = \frac{\sum w^2 (a - \bar a)^2}{\sum w^2 - (\sum w^2)^2 / (\sum w)^2}

    the variance of a ratio of two sums over samples, in which the correlation of positions is contained. With equal
    weights n is the number of samples, and u the unbiased variance of a. That of the reference is u over what 608 of
    these samples would make, where it is not known.
    """
    shift, between = subsets.shift[0], subsets.between[0]
    if stream.samples < 2:
        return torch.full_like(shift, math.nan), None
    number, unit = _effective_samples(moments, subsets)
    spread = between if unit is None else unit
    reference, known = stream.reference, spread / (REFERENCE_SAMPLES * number / stream.samples)
    if reference.mean_error is not None:
        known = (reference.mean_error / reference.std).square()
    error = (spread / number + known).sqrt()
    errors = torch.where(shift == 0, 0.0, shift / error)
    variance = ratio - reference.eps / reference.std.square()
    values = (variance / spread * number)[spread > 0]
    # an estimate, and for independent values as often above their number as below it
    return errors, min(float(values.nanmedian()), float(stream.values)) if values.numel() else None


def _effective_samples(moments: SampleMoments, subsets: _Subsets) -> tuple[Tensor, Tensor | None]:
    """Return n and u of :func:`_standard_errors`, per channel; None for u where it is the variance between samples."""
    count, mean, m2 = (
        t.reshape(moments.groups, -1) for t in (moments.squares.count, moments.squares.mean, moments.squares.m2)
    )
    squared, whole = count.sum(0), subsets.count[0]
    number = whole.square() / torch.where(squared > 0, squared, 1.0)
    if moments.squares is moments.means:
        return number, None
    total = (m2 + torch.where(count > 0, count * (mean - subsets.shift[0]).square(), 0.0)).sum(0)
    return number, torch.where(number > 1 + 1e-9, total / (squared * (1 - 1 / number)), torch.nan)


def _root(squared: float) -> float:
    return math.sqrt(squared) if not squared <= 0 else 0.0  # NaN stays NaN


def _squared_distance(shift: Tensor, ratio: Tensor) -> Tensor:
    return shift.square() + (ratio.clamp(min=0).sqrt() - 1).square()


def _mean_squared_distances(subsets: _Subsets, reference: ReferenceStatistics) -> Tensor:
    """Return D² of each subset.

    A channel that did not vary at all enters with its shift only: where values are rare (a one-hot feature, a sparse
    activation) a short stream may hold none. When no channel varied, though, that is not chance but a constant input.
    """
    shift, ratio = _channels(subsets, reference)
    constant = ratio - reference.eps / reference.std.square() < _CONSTANT
    ratio = torch.where(constant & ~constant.all(1, keepdim=True), 1.0, ratio)
    return _squared_distance(shift, ratio).nanmean(1)


def _jackknife(subsets: _Subsets, reference: ReferenceStatistics, samples: int) -> tuple[float, float]:
    """Return D² without the noise's share, and its standard error."""
    distances = _mean_squared_distances(subsets, reference)
    whole, without = float(distances[0]), distances[1:]
    others = len(without) - 1
    bias = max(others * (float(without.mean()) - whole), 0.0)
    error = math.sqrt(others * float(without.var(correction=0)))
    return whole - bias - _reference_bias(reference, bias * samples / REFERENCE_SAMPLES), error


def _reference_bias(reference: ReferenceStatistics, otherwise: float) -> float:
    """Return what the noise of the reference adds to D² on average: the mean over channels of Var[d] + Var[√r]."""
    if reference.mean_error is None or reference.variance_error is None:
        return otherwise
    of_root = reference.variance_error / (2 * reference.std.square())
    noise = (reference.mean_error / reference.std).square() + of_root.square()
    return float(noise.mean())
