"""Batches too small to be normalized by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from batchnorm.diagnosis.case import SMALL, Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.kept_batches import batch_size, split
from batchnorm.diagnosis.norm_record import Basis, NormRecord
from batchnorm.statistics.sites import Site

__all__ = ["SmallBatches"]

_FEW_VALUES, _FEW_SAMPLES = 8, 4
"""With so few values per channel, or samples, in a batch each normalized value depends heavily on the others."""

_TRIED = (2, 4, 8)
_EXPLAINED = 0.5


class SmallBatches(Cause):
    """Training in batches so small that their statistics say little about the population.

    What it finds:
        A gap in a model that is trained in batches which bring 8 values per channel or fewer to some norm, or 4
        samples: as ``training_batches`` (or ``batches``) show, or as a trial with smaller batches does: the stored
        statistics fit what the norms meet when all normalize by batches of 2, 4 or 8. In training a norm divides by the
        deviation of these few values; each later norm meets, and stores, what that makes of them, and eval mode does
        something else. The stored statistics are noisy, too: an average over 19 batches of two is one of 38 samples.

    What excludes it:
        Norms that the user froze: the weights may have been trained with what they store.

    Evidence:
        The values per channel, and the gap of the stored statistics from the population's.

    Cure:
        Train in larger batches, or with synchronized norms; measuring the statistics mends a part of it. Accumulating
        gradients does not help.
    """

    key = "small_batches"
    excluded_at_home = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all layers whose stored statistics are not the population's."""
        apart = _apart(case)
        trained_on_few = case.home is not None and _typical_size(case.home) <= _FEW_SAMPLES
        if not apart:
            if trained_on_few and not case.explained:
                yield self._harmless(case)
            return
        source = case.at_home or case.gaps
        few = [
            layer
            for layer in source.layers
            if _values(layer) <= _FEW_VALUES or layer.samples <= _FEW_SAMPLES * layer.calls
        ]
        if few and (case.at_home is not None or not case.off):
            layer = min(few, key=_values)
            size = round(layer.samples / layer.calls)
            evidence = f"Batches of {size} bring {_values(layer):.3g} values per channel to {layer.name}"
        else:
            fitting = _fitting(case)
            if fitting is None:
                return
            evidence = f"The stored statistics fit batches of {fitting} samples, each normalized by its own"
        case.explained.update(names_of(apart))
        first = max(apart, key=lambda one: one.distance)
        evidence += (
            f"; the statistics of {first.name} are {first.distance:.2g} standard deviations from the population's, "
            f"variance ratio {float(first.variance_ratio.median()):.2g}."
        )
        yield Suspicion(names_of(apart), evidence, case.recalibrate(apart), case.corrected(apart))

    def _harmless(self, case: Case) -> Suspicion:
        """Return the finding that the batches of training are small, though no gap has come of it."""
        assert case.home is not None
        assert case.at_home is not None
        layer = min(case.at_home.layers, key=_values)
        evidence = (
            f"Training batches of {_typical_size(case.home):g} bring {_values(layer):.3g} values per channel to "
            f"{layer.name}; the largest gap that came of it is {max(one.apart for one in case.layers):.2g} standard "
            "deviations."
        )
        names = names_of(case.layers)
        return Suspicion(names, evidence, case.recalibrate(case.layers), case.corrected(case.layers), "doubtful")


def _apart(case: Case) -> list[LayerGap]:
    """Return the layers that are not on population statistics: if one is far off, those that are less so too."""
    left = case.left
    if not any(layer.apart > case.gaps.threshold for layer in left):
        return []
    return [layer for layer in left if layer.apart > SMALL]


def _typical_size(batches: Sequence[Any]) -> float:
    return float(median(map(batch_size, batches)))


def _values(layer: LayerGap) -> float:
    """Return how many values per channel a call brings; a last, smaller batch hardly counts."""
    return float(layer.record.estimator.pooled.count.min()) / layer.calls


def _fitting(case: Case) -> int | None:
    """Return the size of batches on which what the norms meet fits what they have stored, if there is one."""
    off = case.off
    sizes = [size for size in _TRIED if size <= min(map(batch_size, case.passes.batches)) // 2]
    if not off or off[0] is case.layers[0]:
        return None  # the first norm does not meet what norms make of a batch
    best, best_left = None, _EXPLAINED
    for size in sizes:
        pieces = [piece for batch in case.passes.batches for piece in split(batch, size)][: 256 // size * 2]
        met = case.passes.over(pieces).run(Basis("batch")).records
        left = sum(_left(layer, met) for layer in off) / sum(layer.distance**2 for layer in off)
        if left < best_left:
            best, best_left = size, left
    return best


def _left(layer: LayerGap, met: dict[Site, NormRecord]) -> float:
    mean, variance = (s.cpu() for s in met[layer.site].statistics)
    return layer_distance(layer.stored, (mean, variance), layer.eps) ** 2
