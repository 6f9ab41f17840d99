"""A moving average that is still on its way."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.norm_record import Statistics

__all__ = ["AverageNotArrived", "signs_of_initial"]

_ARRIVED, _NEAR = 0.99, 0.3
_FITS, _FITS_WITH, _FITS_AGAINST = 0.4, 0.6, 0.1
"""The fit has to leave less than this share of the distance: more where momentum and count support it, less where they
speak against it."""


class AverageNotArrived(Cause):
    r"""A moving average that still holds much of its initial value.

    What it finds:
        After t batches with momentum m the stored statistics are

        .. math:: (1 - \alpha) \cdot \text{initial} + \alpha \cdot \text{population} \qquad \alpha = 1 - (1 - m)^t

        with the initial mean 0 and variance 1. A norm with a gap is one of these if one α below 0.9 explains means and
        variances of all its channels; it need not do so as well where momentum and count give an α below 0.99.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model. A momentum of None, whose
        average holds no initial value. Norms that the user froze: the weights may have been trained with what they
        store.

    Evidence:
        α by momentum and count, and α fitted to the channels.

    Cure:
        Measure the statistics; train longer, or with a larger momentum.
    """

    key = "average_not_arrived"

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all such layers."""
        found = {layer: text for layer in case.off if (text := signs_of_initial(layer))}
        found = {layer: signs_of_initial(layer) for layer in case.everywhere(list(found)) if signs_of_initial(layer)}
        if not found:
            return
        case.explained.update(names_of(found))
        others = f" {len(found)} of {len(case.layers)} norms are on their way." if len(found) > 1 else ""
        evidence = f"{next(iter(found.values()))}{others}"
        yield Suspicion(names_of(found), evidence, case.recalibrate(list(found)), case.corrected(list(found)))


def signs_of_initial(layer: LayerGap) -> str:
    """Return what speaks for initial values that are still in the average of one layer, or nothing."""
    if layer.momentum is None and layer.num_batches_tracked:
        return ""  # a cumulative average has forgotten the initial values with the first batch
    expected = _expected(layer)
    fitted, left = _fit(layer.stored, layer.measured, layer.eps)
    known = expected is not None and expected >= _ARRIVED
    fits = 0 < fitted < 0.9 and left < (_FITS_AGAINST if known else _FITS)
    # recalibration counts few batches and needs no more: the count alone says nothing
    supported = expected is not None and expected < _ARRIVED and abs(fitted - expected) < _NEAR and left < _FITS_WITH
    if not (fits or supported):
        return ""
    text = ""
    if expected is not None:
        text = (
            f"Momentum {layer.momentum:g} over {layer.num_batches_tracked} batches leaves "
            f"{100 * (1 - expected):.3g} % of the initial values in the average"
        )
    if fits:
        fit = f"the channels fit {100 * (1 - fitted):.3g} % (mean 0, variance 1) + {100 * fitted:.3g} % of the measured"
        text = f"{text}; {fit}" if text else f"{fit[0].upper()}{fit[1:]}"
    return f"{text}; the gap is {layer.distance:.2g} standard deviations."


def _expected(layer: LayerGap) -> float | None:
    momentum, count = layer.momentum, layer.num_batches_tracked
    if momentum is None or count is None or not 0 < momentum < 1:
        return None
    return -math.expm1(count * math.log1p(-momentum))


def _fit(stored: Statistics, measured: Statistics, eps: float) -> tuple[float, float]:
    """Return α by least squares over all means and variances, and the share of the distance that is left with it."""
    scale = measured[1] + eps
    x = torch.cat([measured[0] / scale.sqrt(), (measured[1] - 1) / scale])
    y = torch.cat([stored[0] / scale.sqrt(), (stored[1] - 1) / scale])
    alpha = float((x * y).sum() / x.square().sum().clamp(min=1e-300))
    blend = (alpha * measured[0], (1 - alpha) + alpha * measured[1])
    before = layer_distance(stored, measured, eps)
    return alpha, layer_distance(stored, blend, eps) / max(before, 1e-300)
