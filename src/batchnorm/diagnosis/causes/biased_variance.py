"""Variances with the wrong divisor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, module_line, names_of
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["BiasedVariance"]

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
_LEAST = 0.05
_LEFT = 0.1
"""What the factor leaves of the squared deviations of means and scales, at most."""


@dataclass(frozen=True)
class _Fit:
    size: int
    power: int
    left: float


class BiasedVariance(Cause):
    r"""Variances with divisor m where m − 1 was meant, or corrected twice.

    What it finds:
        Variances that differ from the measured ones by one factor in all channels of a layer,

        .. math:: \frac{m - 1}{m} \quad\text{or}\quad \frac{m}{m - 1}
            \qquad m = \text{batch size} \times \text{positions}

        with one batch size up to 16 for all layers, while the means agree: statistics of small batches, imported from a
        framework that keeps the other convention. With larger m nobody can see the factor, and it does no harm.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model.

    Evidence:
        The factor in the first layer, the batch size that fits, and how well.

    Cure:
        Multiply by the inverse factor, or measure the statistics.
    """

    key = "biased_variance"
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all layers in which the factor is felt."""
        layers = case.left
        if not any(layer.off for layer in layers):
            return
        fit = _fit(layers)
        if fit is None:
            return
        felt = [layer for layer in layers if abs(_expected(layer, fit)) >= _LEAST]
        if any(layer.off for layer in layers if layer not in felt):
            return
        case.explained.update(names_of(layers))
        first = max(felt, key=lambda layer: abs(_expected(layer, fit)))
        m = fit.size * _positions(first)
        right = f"{m} / {m - 1}" if fit.power > 0 else f"{m - 1} / {m}"
        evidence = (
            f"Stored over measured variance is {math.exp(-float(first.log_ratio.mean())):.3g} in every channel of "
            f"{first.name or 'the norm'}, means agree: {_shown(m, fit.power)} for batches of {fit.size}, which "
            f"explains {100 * (1 - fit.left):.0f} % of the deviations; felt in {len(felt)} of {len(case.layers)} norms."
        )
        cure = f"{module_line(first.name)}.running_var.mul_({right})" if len(layers) == 1 else case.recalibrate(layers)
        yield Suspicion(names_of(layers), evidence, cure, case.corrected(layers))


def _shown(m: int, power: int) -> str:
    return f"({m} − 1)/{m}" if power > 0 else f"{m}/({m} − 1)"


def _positions(layer: LayerGap) -> int:
    """Return how many values of a channel one sample has."""
    return max(1, round(float(layer.record.estimator.pooled.count.max()) / max(layer.samples, 1)))


def _expected(layer: LayerGap, fit: _Fit) -> float:
    m = fit.size * _positions(layer)
    return fit.power * math.log(m / (m - 1)) if m > 1 else 0.0


def _fit(layers: Sequence[LayerGap]) -> _Fit | None:
    """Return the batch size and direction that fit best, if they explain the deviations of all layers."""
    # noise of the estimates is no deviation
    chance = sum(float(layer.noise.mean()) for layer in layers)
    total = sum(_deviations(layer, 0.0) for layer in layers)
    if total <= 4 * chance:
        return None
    best: _Fit | None = None
    for power in (1, -1):
        for size in _SIZES:
            fit = _Fit(size, power, 0.0)
            expected = [_expected(layer, fit) for layer in layers]
            if max(map(abs, expected), default=0.0) < _LEAST:
                continue
            left = sum(_deviations(layer, e) for layer, e in zip(layers, expected, strict=True))
            share = max(left - chance, 0.0) / (total - chance)
            if best is None or share < best.left:
                best = _Fit(size, power, share)
    return best if best is not None and best.left < _LEFT else None


def _deviations(layer: LayerGap, expected: float) -> float:
    """Return the mean square over the channels of what the factor leaves: of the mean, and of the scale."""
    scale = (layer.log_ratio - expected).square() / 4
    return float((layer.mean_shift.square() + scale).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0).mean())
