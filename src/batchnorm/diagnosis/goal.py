"""What the user wants of the model, as their metric tells it: which of two runs is better, and by more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from batchnorm.diagnosis.passes import Pass
from batchnorm.diagnosis.readings import Reading

__all__ = ["Goal"]

_CERTAIN = 2.0
"""A difference of so many standard errors is none of chance."""

_NEGLIGIBLE = 0.01
"""A difference below this share of the way from outputs of other samples to the best run is not worth a finding."""

_CHANCE = 0.05
_SKILL = 0.12
"""A smaller share of the way from outputs of other samples to the best outputs there are is no skill."""

_DEPENDS = 1e-5


@dataclass(frozen=True)
class Goal:
    """Compares runs of the model by the metric.

    Attributes:
        deployed: the run in eval mode, as the model is.
        training: the run on batch statistics.
        recalibrated: the run on population statistics.
        given: whether more is better, if the user said so.
    """

    deployed: Pass
    training: Pass
    recalibrated: Pass
    given: bool | None = None

    @cached_property
    def higher_is_better(self) -> bool | None:
        """Whether more is better, as the user said, or as outputs tell that are what is wanted, or of other samples.

        None without a metric, and where nothing tells: the metric looks at the outputs alone, or is at chance.
        """
        if self.deployed.metric is None:
            return None
        if self.given is not None:
            return self.given
        runs = (self.training, self.recalibrated, self.deployed)
        for beside in ("ideal", "other"):
            best, sign = 0.0, 0.0
            for done in runs:
                mean, error = _mean_and_error(done.readings, beside)
                certain = abs(mean) / max(error, 1e-12 * abs(mean), 1e-300)
                if certain > max(best, _CERTAIN) and (beside == "ideal" or _depends(done.readings)):
                    best, sign = certain, -mean if beside == "ideal" else mean
            if sign:
                return sign > 0
        return None

    @property
    def known(self) -> bool:
        """Whether runs can be compared."""
        return self.higher_is_better is not None

    def gain(self, before: Pass, after: Pass) -> float:
        """Return by how much the metric of a run is better than that of another; NaN is the worst value there is."""
        difference = _worth(after.metric, self._sign) - _worth(before.metric, self._sign)
        return 0.0 if math.isnan(difference) else difference

    def improves(self, before: Pass, after: Pass) -> bool:
        """Return whether a run is better than another by more than chance, and by more than is worth a word."""
        gain = self.gain(before, after)
        if not math.isfinite(gain):
            return gain > 0
        _, error = _difference(before.readings, after.readings)
        return gain > max(_CERTAIN * error, _NEGLIGIBLE * self._span)

    @cached_property
    def eval_is_as_good(self) -> bool:
        """Whether eval mode is as good as batch statistics, and as population statistics."""
        return self.known and not any(self.improves(self.deployed, done) for done in (self.training, self.recalibrated))

    @cached_property
    def eval_is_better(self) -> bool:
        """Whether eval mode is better than batch statistics, or than population statistics, by more than chance."""
        return self.eval_is_as_good and any(
            self.improves(done, self.deployed) for done in (self.training, self.recalibrated)
        )

    @property
    def chance(self) -> float:
        """The metric on batch statistics if each sample is given the output for another one."""
        mean, _ = _mean_and_error(self.training.readings, "other")
        return (self.training.metric or 0.0) - mean

    @cached_property
    def at_chance(self) -> bool:
        """Whether the model is no better, on any statistics, than it would be with the outputs of other samples."""
        runs = (self.deployed, self.training, self.recalibrated)
        if self.deployed.metric is None or not _depends(self.training.readings):
            return False
        # outputs that are nearly alike fit other samples too: what is better than on other statistics is no chance
        return all(map(self._as_bad_as_zeros, runs)) or (all(map(self.by_chance, runs)) and not self.eval_is_better)

    def by_chance(self, done: Pass) -> bool:
        """Return whether the metric of a run is hardly better than with the outputs of other samples, or with zeros."""
        if done.metric is None or not math.isfinite(done.metric):
            return True
        mean, error = _mean_and_error(done.readings, "other")
        way = self._sign * mean if self.known else abs(mean)
        if way <= max(3 * error, _CHANCE * abs(done.metric - mean)):
            return True
        to_ideal, _ = _mean_and_error(done.readings, "ideal")
        ideal_known = self.known and all(r.ideal is not None for r in done.readings)
        return (ideal_known and way < _SKILL * (way + abs(to_ideal))) or self._as_bad_as_zeros(done)

    def _as_bad_as_zeros(self, done: Pass) -> bool:
        """Return whether outputs that are all zero would be as good."""
        if done.metric is None or not math.isfinite(done.metric):
            return True
        over_zeros, _ = _mean_and_error(done.readings, "zeros")
        return self.known and all(r.zeros is not None for r in done.readings) and self._sign * over_zeros <= 0

    def closed(self, after: Pass) -> float | None:
        """Return the share of the way from eval mode to the best of the other two that a run goes; None without one."""
        goal = max((self.training, self.recalibrated), key=lambda done: _worth(done.metric, self._sign))
        way = self.gain(self.deployed, goal)
        if not self.known or not math.isfinite(way) or not self.improves(self.deployed, goal):
            return None
        return self.gain(self.deployed, after) / way

    @property
    def _sign(self) -> float:
        return -1.0 if self.higher_is_better is False else 1.0

    @cached_property
    def _span(self) -> float:
        """How far the best run is from outputs of other samples: what there is to be won at all."""
        best = max((self.deployed, self.training, self.recalibrated), key=lambda done: _worth(done.metric, self._sign))
        mean, _ = _mean_and_error(best.readings, "other")
        return abs(mean)


def _worth(metric: float | None, sign: float) -> float:
    return -math.inf if metric is None or math.isnan(metric) else sign * metric


def _depends(readings: Sequence[Reading]) -> bool:
    """Return whether it matters to the metric which outputs belong to which samples."""
    return any(
        r.turned is not None and abs(r.turned - r.value) > _DEPENDS * max(abs(r.value), abs(r.turned), 1e-30)
        for r in readings
    )


def _mean_and_error(readings: Sequence[Reading], other: str) -> tuple[float, float]:
    """Return the mean of value less that of other samples, weighted by samples, and its standard error."""
    pairs = [(r.samples, r.value - value) for r in readings if (value := getattr(r, other)) is not None]
    mean, error = _weighted(pairs)
    return (mean, error) if math.isfinite(mean) else (0.0, 0.0)


def _difference(before: Sequence[Reading], after: Sequence[Reading]) -> tuple[float, float]:
    return _weighted([(a.samples, a.value - b.value) for b, a in zip(before, after, strict=True)])


def _weighted(pairs: Sequence[tuple[int, float]]) -> tuple[float, float]:
    total = sum(weight for weight, _ in pairs)
    if not total:
        return 0.0, 0.0
    mean = sum(weight * value for weight, value in pairs) / total
    if len(pairs) < 3:  # too few to tell what chance is
        return mean, 0.0
    squares = sum((weight / total) ** 2 * (value - mean) ** 2 for weight, value in pairs)
    return mean, math.sqrt(squares * len(pairs) / (len(pairs) - 1))
