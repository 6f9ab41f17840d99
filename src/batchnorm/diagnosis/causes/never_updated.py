"""Statistics that nobody ever measured."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of, span
from batchnorm.diagnosis.causes.initial import is_initial

__all__ = ["NeverUpdated"]


class NeverUpdated(Cause):
    """Running statistics that are still the initial ones.

    What it finds:
        Mean 0 and variance 1 in every channel, and either a count of zero batches or a gap. The norm divides by
        √(1 + ε), which is to say that it does not normalize at all: buffers that were not loaded with the weights, a
        norm added after training, training with ``momentum=0``, or a model that was never trained.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model. A model in which every
        norm is as constructed; see ``untrained``.

    Evidence:
        The stored values, the batches counted, and the variances measured.

    Cure:
        Measure the statistics.
    """

    key = "never_updated"
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all such layers."""
        never = [layer for layer in case.left if is_initial(layer) and (layer.off or layer.num_batches_tracked == 0)]
        if not never:
            return
        case.explained.update(names_of(never))
        first = never[0]
        counted = "" if first.num_batches_tracked is None else f", {first.num_batches_tracked} batches counted"
        zero = ", momentum 0" if first.momentum == 0 else ""
        others = f"; the same in {len(never)} of {len(case.layers)} norms" if len(never) > 1 else ""
        evidence = (
            f"Mean 0 and variance 1 in all {first.stored[0].numel()} channels{counted}{zero}; measured: mean "
            f"{span(first.measured[0])}, variance {span(first.measured[1])}{others}."
        )
        yield Suspicion(names_of(never), evidence, case.recalibrate(never), case.corrected(never))
