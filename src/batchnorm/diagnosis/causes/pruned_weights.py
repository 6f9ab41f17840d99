"""Weights set to zero after the statistics were taken."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["PrunedWeights"]

_LEAST = 0.1


class PrunedWeights(Cause):
    """A layer was pruned, and the norm behind it still has the statistics of before.

    What it finds:
        A gap behind a linear layer or a convolution of whose weights at least a tenth are exactly zero.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model.
        Norms that the user froze: the weights may have been trained with what they store.

    Evidence:
        The share of zeros, and the gap.

    Cure:
        Measure the statistics.
    """

    key = "pruned_weights"

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all such layers."""
        pruned = [layer for layer in case.left if _zeros(layer) >= _LEAST]
        found = [layer for layer in case.off if layer in pruned]
        if not found:
            return
        # pruning one layer may be felt in another, whose weights are whole
        if 2 * len(pruned) > len(case.layers):
            found = case.everywhere(case.off)
        case.explained.update(names_of(found))
        first = next(layer for layer in found if layer in pruned)
        evidence = (
            f"{100 * _zeros(first):.3g} % of the weights before it are exactly 0; variance ratio "
            f"{float(first.variance_ratio.median()):.2g}, typical mean shift "
            f"{float(first.mean_shift.abs().median()):.2g} σ "
            f"({len(pruned)} of {len(case.layers)} norms are behind pruned weights)."
        )
        yield Suspicion(names_of(found), evidence, case.recalibrate(found), case.corrected(found))


def _zeros(layer: LayerGap) -> float:
    weight = layer.record.feeder
    return 0.0 if weight is None or not weight.numel() else float((weight.detach() == 0).double().mean())
