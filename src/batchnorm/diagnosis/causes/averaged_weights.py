"""Weights averaged, statistics not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.diagnosis.case import SMALL, Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["AveragedWeights"]

_SHRUNK = -0.08
_MOST = 0.75
_HURT = 0.15
"""Shrunk variances add up: where a norm meets what is so far from its statistics, no single gap need be large."""


class AveragedWeights(Cause):
    """The weights are an average of several models, the statistics are of one of them, or an average themselves.

    What it finds:
        A gap in a model that counts averaged models (``n_averaged``, as ``torch.optim.swa_utils.AveragedModel`` does),
        or whose measured variances are smaller than the stored ones throughout: in at least three quarters of the
        norms, and of their channels, by eight per cent in the middle, while means moved less than scales. What differs
        between the models that are averaged cancels, so that activations of an average have less variance than the
        average of their variances.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model.
        Norms that the user froze: the weights may have been trained with what they store.

    Evidence:
        How many models were averaged, or the variance ratios.

    Cure:
        Measure the statistics.
    """

    key = "averaged_weights"

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all layers that are left."""
        shrunk, median = _shrunk(case.layers)
        shrunk &= not case.explained  # what another cause did to the values shows in all their norms
        hurt = bool(case.off) or max((layer.deployed_excess() for layer in case.layers), default=0.0) > _HURT
        if (case.n_averaged is None and not shrunk) or not hurt:
            return
        left = [layer for layer in case.left if layer.excess() > SMALL]
        if not left:
            return
        case.explained.update(names_of(left))
        averaged = "" if case.n_averaged is None else f"n_averaged is {case.n_averaged}; "
        evidence = (
            f"{averaged}variance ratio {median.exp():.2g} in the middle, below 1 in "
            f"{sum(bool(_log_ratio(layer).median() < 0) for layer in case.layers)} of {len(case.layers)} norms."
        )
        yield Suspicion(names_of(left), evidence, case.recalibrate(left), case.corrected(left))


def _log_ratio(layer: LayerGap) -> Tensor:
    return layer.variance_ratio.log().nan_to_num(0.0)


def _shrunk(layers: tuple[LayerGap, ...]) -> tuple[bool, Tensor]:
    """Return whether variances shrank throughout, and the median logarithm of their ratio."""
    if len(layers) < 2:
        return False, torch.zeros((), device="cpu")
    medians = torch.stack([_log_ratio(layer).median() for layer in layers])
    shares = torch.stack([(_log_ratio(layer) < 0).double().mean() for layer in layers])
    throughout = float((medians < 0).double().mean()) >= _MOST and float(shares.mean()) >= _MOST
    return throughout and float(medians.median()) < _SHRUNK and not _moved(layers), medians.median()


def _moved(layers: tuple[LayerGap, ...]) -> bool:
    """Return whether means moved by more than scales did: those of other weights do, those of an average hardly."""
    shift = sum(float(layer.mean_shift.square().mean()) for layer in layers)
    return shift > sum(float(_log_ratio(layer).square().mean()) / 4 for layer in layers)
