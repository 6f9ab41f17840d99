"""A momentum that another framework means the other way round."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, module_line, names_of
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["MomentumConvention"]

_LEAST = 0.5
_PRECISE = 0.15
"""Stored statistics whose squared error is below this share of a single batch's were measured otherwise."""


class MomentumConvention(Cause):
    """A momentum of 0.9 or 0.99, which PyTorch takes for the weight of the *new* batch.

    What it finds:
        A norm with a momentum of 0.5 or more. PyTorch computes running ← (1 − momentum) · running + momentum · batch,
        Keras, Flax and ONNX the other way round: their 0.99 is PyTorch's 0.01. With 0.99 the stored statistics are
        those of the last batch. Norms whose statistics are more precise than that, because they were measured since,
        are no finding.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model.
        Norms that the user froze: the weights may have been trained with what they store.

    Evidence:
        The momentum, over how many batches it averages, and how far the stored means scatter about the measured ones,
        beside the scatter of single batches.

    Cure:
        Set momentum to one minus it, and measure the statistics.
    """

    key = "momentum_convention"

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all such layers."""
        found = [layer for layer in case.left if _is_last_batch(layer)]
        if found:
            found = [layer for layer in case.layers if layer in found or (layer in case.off and _is_large(layer))]
        if not found:
            return
        case.explained.update(names_of(found))
        first = found[0]
        assert first.momentum is not None
        evidence = (
            f"momentum={first.momentum:g} averages over {(2 - first.momentum) / first.momentum:.2g} batches in "
            f"PyTorch; the stored means are off by {_scatter(first) ** 0.5:.2g} times the error of a single batch's "
            f"({len(found)} of {len(case.layers)} norms)."
        )
        better = round(1 - first.momentum, 6) or 0.01
        where = (
            f"{module_line(first.name)}.momentum = {better:g}"
            if len(found) == 1
            else f"[setattr(m, 'momentum', {better:g}) for m in model.modules() "
            f"if getattr(m, 'momentum', None) == {first.momentum:g}]"
        )
        cure = f"{where}; {case.recalibrate(found)}"
        yield Suspicion(names_of(found), evidence, cure, case.corrected(found))


def _is_large(layer: LayerGap) -> bool:
    return layer.momentum is not None and layer.momentum >= _LEAST


def _is_last_batch(layer: LayerGap) -> bool:
    return _is_large(layer) and _scatter(layer) > _PRECISE


def _scatter(layer: LayerGap) -> float:
    """Return the squared error of the stored means in units of a batch mean's, without the error of the measurement."""
    error = layer.errors[0].square()
    batches = layer.samples / max(layer.samples / layer.calls, 1)
    deviation = (layer.stored[0] - layer.training[0]).square()
    usable = error > 0
    if not bool(usable.any()):
        return 0.0
    return float((deviation[usable] / (error[usable] * batches)).median()) / 0.455 - 1 / batches
