"""A norm that stopped learning its statistics too early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.average_not_arrived import signs_of_initial
from batchnorm.diagnosis.causes.cause import Cause, listing, names_of
from batchnorm.diagnosis.causes.initial import is_initial
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["FrozenWrong"]

_INITIAL = 0.01
_STOPPED = 0.7
"""A norm that counts fewer than this share of the batches of the others was stopped."""


class FrozenWrong(Cause):
    """A frozen norm whose statistics are not those of what it meets.

    What it finds:
        A norm with a gap of its own that is frozen (by ``batchnorm.freeze``, or in eval mode inside a model in train
        mode) while others are not; or one that counts fewer batches than the others, as a norm does that was frozen
        for a part of the training.

    What excludes it:
        Statistics that fit the training batches. Frozen norms with statistics of some data, where the norms behind them
        fit what they meet as the model is, or where all are frozen: the weights may have been trained with them; see
        ``kept_statistics``.

    Evidence:
        How it is frozen, the batches it counts beside those of the others, and its gap.

    Cure:
        Measure its statistics, and those of the norms behind it that have learnt to live with the wrong ones. It may
        stay frozen.
    """

    key = "frozen_wrong"
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all such layers."""
        counts = [layer.num_batches_tracked or 0 for layer in case.layers]
        most = max(counts, default=0)
        frozen = {layer: why for layer in _wrong(case) if (why := case.why_frozen(layer) or _stopped(layer, most))}
        frozen = {layer: why for layer, why in frozen.items() if _is_to_blame(case, layer)}
        if not frozen or all(map(case.why_frozen, case.layers)):
            return
        case.explained.update(names_of(frozen))
        layer, why = next(iter(frozen.items()))
        others = f"; {listing(names_of(frozen)[1:])} likewise" if len(frozen) > 1 else ""
        mended = [
            one
            for one in case.layers
            if one in frozen or (_after(case, one, layer) and one.apart > case.gaps.threshold)
        ]
        evidence = (
            f"{why[0].upper()}{why[1:]}; its stored statistics are {layer.distance:.2g} standard deviations from what "
            f"it meets{others}."
        )
        yield Suspicion(names_of(frozen), evidence, case.recalibrate(mended), case.corrected(mended))


def _wrong(case: Case) -> list[LayerGap]:
    """Return the layers that are off, and those that never learnt anything."""
    never = [layer for layer in case.layers if is_initial(layer) and layer.num_batches_tracked == 0]
    return [layer for layer in case.layers if layer in case.off or (layer in never and layer.name in case.frozen)]


def _is_to_blame(case: Case, layer: LayerGap) -> bool:
    """Return whether the statistics are of no data, or were right for the norms behind it when those were measured.

    Else they may be those of a model that the weights have been fine-tuned from.
    """
    if is_initial(layer) or signs_of_initial(layer):
        return True
    behind = [one for one in case.layers if _after(case, one, layer) and not case.why_frozen(one)]
    own, deployed = (sum(min(gap, 3.0) for gap in gaps) for gaps in _gaps(behind))
    return bool(behind) and own < deployed


def _gaps(layers: Sequence[LayerGap]) -> tuple[list[float], list[float]]:
    """Return the distances of norms with all before them put right, and as the model is."""
    return [layer.distance for layer in layers], [layer.deployed_distance for layer in layers]


def _after(case: Case, one: LayerGap, other: LayerGap) -> bool:
    """Return whether one layer runs after another: it may have learnt to live with the fault of that one."""
    return case.layers.index(one) > case.layers.index(other)


def _stopped(layer: LayerGap, most: int) -> str:
    count, momentum = layer.num_batches_tracked, layer.momentum
    if count is None or count >= _STOPPED * most or is_initial(layer):
        return ""
    if momentum is None or (1 - momentum) ** count > _INITIAL:
        return ""  # its average has not arrived, or is one over batches that it began to count anew
    return f"it counts {count} batches where other norms count {most}"
