"""What each norm has stored beside what it meets, so that a fault is told from what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from batchnorm.diagnosis.distance import kl, layer_distance, squared_distance, typical
from batchnorm.diagnosis.norm_record import Basis, NormRecord, Statistics
from batchnorm.diagnosis.passes import Pass, Passes
from batchnorm.diagnosis.population import population_of
from batchnorm.models.snapshot import set_eval
from batchnorm.report.result import finite_or_none
from batchnorm.statistics.sites import BATCHES, Site

__all__ = ["TOLERANCE", "Gaps", "LayerGap", "measure"]

TOLERANCE = 0.2
"""A typical channel that is off by less, in standard deviations, is no finding: that is what a moving average lags
behind weights that are still learning."""

_STRICT = 0.1
"""The tolerance where the other layers of the model show that its averages do not lag, and of cumulative averages."""

_ADDED_UP = 0.5
"""A norm that meets, as the model is, what is so far from its statistics is hurt, whoever is to blame."""

_NOISE = 3.0  # so many times the expected squared noise is no gap


@dataclass(frozen=True, eq=False)
class LayerGap:
    r"""What one norm has stored, and what it meets.

    All statistics are float64, (C,), on the CPU; variances are unbiased (divisor n − 1; the stored one by the
    convention of whoever stored it).

    Attributes:
        name: the norm's name; ``""`` if the model itself is the norm.
        stored: mean and variance in its buffers.
        measured: what it meets in eval mode once every norm before it is right: its population statistics.
        deployed: what it meets in eval mode as the model is: here a layer inherits the faults of those before it.
        training: what it meets while all norms normalize by the batch, as in training.
        eps: what it adds to the variance.
        momentum: of its moving average; None for a cumulative one, and for a functional norm.
        num_batches_tracked: how many batches it counts; None where nobody counts.
        batches: how many batches it met.
        calls: how often it was called on them.
        samples: how many samples that were.
        fewest: the smallest number of values per channel in one call.
        recalibrated_distance: how far what it meets is from what it normalizes by once all norms are recalibrated.
        errors: standard errors of the measured mean and variance.
        noise: expected squared distance of the stored statistics from the measured ones by chance, (C,).
        off: whether the stored statistics are not those of what the norm meets, by a fault of its own.
    """

    name: str
    stored: Statistics
    measured: Statistics
    deployed: Statistics
    training: Statistics
    eps: float
    momentum: float | None
    num_batches_tracked: int | None
    batches: int
    calls: int
    samples: int
    fewest: int
    recalibrated_distance: float
    errors: tuple[Tensor, Tensor]
    noise: Tensor
    off: bool
    site: Site = field(repr=False)
    record: NormRecord = field(repr=False)

    @property
    def mean_shift(self) -> Tensor:
        """(measured mean − stored mean) / √(measured variance + ε), (C,)."""
        return (self.measured[0] - self.stored[0]) / (self.measured[1] + self.eps).sqrt()

    @property
    def variance_ratio(self) -> Tensor:
        """(measured variance + ε) / (stored variance + ε), (C,)."""
        return (self.measured[1] + self.eps) / (self.stored[1] + self.eps)

    @property
    def kl(self) -> Tensor:
        """Symmetric Kullback–Leibler divergence of the two normal distributions, in nats, (C,)."""
        return kl(*self.measured, *self.stored, self.eps)

    @property
    def distance(self) -> float:
        """How far the stored statistics are from the population's, typical channel, in standard deviations."""
        return layer_distance(self.stored, self.measured, self.eps)

    @property
    def deployed_distance(self) -> float:
        """The same from what the norm meets now, inherited errors included."""
        return layer_distance(self.stored, self.deployed, self.eps)

    @property
    def apart(self) -> float:
        """How far the stored statistics are from the population's, noise of the measurement taken off, no excuse."""
        return typical(squared_distance(*self.stored, *self.measured, self.eps) - _NOISE * self.measurement_noise)

    def deployed_excess(self) -> float:
        """Return what of the distance from what the norm meets now is not chance, inherited errors included."""
        squared = squared_distance(*self.stored, *self.deployed, self.eps)
        return typical((squared - _NOISE * self.noise).nan_to_num(nan=0.0, posinf=0.0))

    def excess(self, without: Tensor | None = None) -> float:
        """Return what of the distance is neither chance nor the batch size: from what fits best, noise taken off.

        A norm that fits what it meets as the model is has learnt to live with a fault before it: it is none itself.

        Args:
            without: channels that do not count, bool, (C,).
        """
        return min(self.excess_from(met, without) for met in (self.measured, self.training, self.deployed))

    def excess_from(self, met: Statistics, without: Tensor | None = None) -> float:
        """Return what of the distance of the stored statistics from others is not chance.

        Args:
            met: statistics of as many samples as those that were measured.
            without: channels that do not count, bool, (C,).
        """
        keep = slice(None) if without is None else ~without
        squared = squared_distance(*self.stored, *met, self.eps)[keep]
        return typical((squared - _NOISE * self.noise[keep]).nan_to_num(nan=math.inf))

    @property
    def log_ratio(self) -> Tensor:
        """Logarithm of measured over stored variance (each plus ε), by the measurement that fits better, (C,)."""
        ratios = [
            ((reference[1] + self.eps) / (self.stored[1] + self.eps)).log().nan_to_num(0.0)
            for reference in (self.measured, self.training)
        ]
        return min(ratios, key=lambda ratio: float(ratio.var(correction=0)))

    @property
    def relative_error(self) -> float:
        """Expected distance of the measured statistics from the population's by chance, typical channel."""
        return typical(self.measurement_noise)

    @property
    def measurement_noise(self) -> Tensor:
        """Expected squared distance of the measured statistics from the population's by chance, (C,)."""
        variance = self.measured[1] + self.eps
        return self.errors[0].square() / variance + self.errors[1].square() / (4 * variance.square())

    def to_dict(self) -> dict[str, Any]:
        """Return the counts, the distances, and the gap of each channel as plain numbers."""
        return {
            "name": self.name,
            "off": self.off,
            "batches": self.batches,
            "calls": self.calls,
            "samples": self.samples,
            "eps": self.eps,
            "momentum": self.momentum,
            "num_batches_tracked": self.num_batches_tracked,
            "distance": finite_or_none(self.distance),
            "deployed_distance": finite_or_none(self.deployed_distance),
            "recalibrated_distance": finite_or_none(self.recalibrated_distance),
            "beyond_noise": finite_or_none(self.excess()),
            "mean_shift": _plain(self.mean_shift),
            "variance_ratio": _plain(self.variance_ratio),
            "kl": _plain(self.kl),
            "mean_error": _plain(self.errors[0]),
            "variance_error": _plain(self.errors[1]),
        }


def _plain(values: Tensor) -> list[float | None]:
    return [finite_or_none(float(f"{value:.6g}")) for value in values.tolist()]


@dataclass(frozen=True, eq=False)
class Gaps:
    """Everything that was measured.

    Attributes:
        layers: one entry a norm, in order of execution.
        deployed: the pass in eval mode on the stored statistics.
        training: the pass on batch statistics.
        recalibrated: the pass on population statistics.
        population: those statistics.
        threshold: a layer is off if its statistics are further off than this: 0.2 standard deviations; down to 0.1
            where the other layers fit that well; less where many small gaps add up to a large one.
    """

    layers: tuple[LayerGap, ...]
    deployed: Pass
    training: Pass
    recalibrated: Pass
    population: dict[Site, list[Statistics]]
    threshold: float = TOLERANCE


def measure(passes: Passes) -> Gaps:
    r"""Measure a model's norms on stored, batch, and population statistics.

    The population statistics of a norm are those of what it meets with every *earlier* norm on its own population
    statistics, so that a layer is not blamed for what an earlier one does to it: those of a recalibration in the
    sequential order.

    Raises:
        ShapeError: a norm met fewer than two values per channel in all.
    """
    model = passes.model
    if model.training:  # it is being trained, and will be deployed as eval() leaves it
        set_eval(model)
    deployed = passes.run(Basis("stored"), tolerant=True)
    set_eval(model)
    training = passes.run(Basis("batch"))
    population = population_of(passes, training)
    recalibrated = passes.run(Basis("batch", population), tolerant=True)
    layers = tuple(
        _layer(site, record, population[site][0], deployed, training) for site, record in recalibrated.records.items()
    )
    threshold = _threshold(layers)
    layers = tuple(replace(layer, off=not layer.excess() <= _tolerated(layer, threshold)) for layer in layers)
    return Gaps(layers, deployed, training, recalibrated, population, threshold)


def _threshold(layers: tuple[LayerGap, ...]) -> float:
    """Return the tolerance; less where the other layers fit well, and where many small gaps add up to a large one."""
    own = sorted(layer.excess() for layer in layers)
    largest = max(own, default=0.0)
    usual = own[(len(own) - 1) // 2] if own else 0.0
    tolerance = min(TOLERANCE, max(_STRICT, 4 * usual)) if len(own) > 2 else TOLERANCE
    inherited = max((layer.deployed_excess() for layer in layers), default=0.0)
    if largest <= tolerance and inherited > _ADDED_UP and largest > 0:
        return largest / 2
    return tolerance


def _tolerated(layer: LayerGap, threshold: float) -> float:
    """Return how far a layer may be off; a cumulative average is to be as of one model, and has no lag to excuse."""
    cumulative = layer.momentum is None and bool(layer.num_batches_tracked)
    return min(threshold, _STRICT) if cumulative else threshold


def _change(before: Statistics, record: NormRecord) -> float:
    if not bool(record.estimator.pooled.isfinite().all()):
        return math.inf
    return layer_distance(before, record.statistics, record.eps)


def _size(record: NormRecord) -> float:
    """Return how many samples a call has, which stands for the batch size of the training."""
    return record.samples / max(record.calls, 1)


def _layer(site: Site, record: NormRecord, measured: Statistics, deployed: Pass, training: Pass) -> LayerGap:
    momentum = getattr(site.owner, "momentum", None)
    counter = getattr(site.owner, BATCHES, None)
    tracked = int(counter) if isinstance(counter, Tensor) else None
    errors = tuple(e.cpu() for e in record.spread.standard_errors())
    variance = measured[1].cpu()
    noise = _noise(errors, variance, record, _size(record), _averaged(momentum, tracked))
    nothing = torch.full_like(variance, torch.nan)
    met = deployed.records.get(site)
    return LayerGap(
        name=site.name,
        stored=_flat(site.running_mean, site.running_var),
        measured=_flat(*measured),
        deployed=(nothing, nothing) if met is None else _flat(*met.statistics),
        training=_flat(*training.records[site].statistics),
        eps=record.eps,
        momentum=momentum,
        num_batches_tracked=tracked,
        batches=record.batches,
        calls=record.calls,
        samples=record.samples,
        fewest=record.fewest,
        recalibrated_distance=_change(measured, record),
        errors=(errors[0], errors[1]),
        noise=noise,
        off=False,
        site=site,
        record=record,
    )


def _flat(mean: Tensor, variance: Tensor) -> Statistics:
    return mean.detach().reshape(-1).double().cpu(), variance.detach().reshape(-1).double().cpu()


def _averaged(momentum: float | None, tracked: int | None) -> float:
    """Return over how many independent batches a moving average averages."""
    if momentum is None:
        return float(tracked or 100)
    return (2 - momentum) / momentum if 0 < momentum < 0.5 else 19.0


def _noise(
    errors: tuple[Tensor, ...], variance: Tensor, record: NormRecord, batch_size: float, averaged: float
) -> Tensor:
    r"""Return the expected squared distance by chance: the measured statistics are noisy, and so are the stored ones.

    The squared error of a mean over n samples is n/k times smaller than that over k samples, whatever the correlation
    inside a sample. A moving average of momentum m has the error of (2 − m)/m batches.
    """
    relative = 1 + record.samples / max(batch_size * averaged, 1.0)
    v = variance + record.eps
    return relative * (errors[0].square() / v + errors[1].square() / (4 * v.square()))
