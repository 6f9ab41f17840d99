"""Statistics of other weights, or of other data."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of

__all__ = ["Stale"]


class Stale(Cause):
    """Stored statistics that fit neither the data nor anything known.

    What it finds:
        The layers with a gap of their own that no other cause explains. Their weights, or those before them, changed
        after the statistics were taken: loaded from another checkpoint, trained on with the norms in eval mode,
        quantized, merged; or the data are not those of the training in a way that ``training_batches`` would tell.

    What excludes it:
        Statistics that fit the training batches: then the data changed, not the model.
        Norms that the user froze: the weights may have been trained with what they store.

    Evidence:
        The gap of the first guilty layer: mean shift and variance ratio.

    Cure:
        Measure the statistics.
    """

    key = "stale"

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all layers that are left."""
        left = case.everywhere(case.off)
        if not left:
            return
        case.explained.update(names_of(left))
        first = left[0]
        shift = first.mean_shift.abs()
        ratio = first.variance_ratio
        home = "" if case.at_home is None else "; the training batches do not fit either"
        others = f"; {len(left)} of {len(case.layers)} norms have a gap of their own" if len(left) > 1 else ""
        evidence = (
            f"Typical mean shift {float(shift.median()):.2g} σ (largest {float(shift.max()):.2g}), variance ratio "
            f"{float(ratio.min()):.2g} to {float(ratio.max()):.2g}{others}{home}."
        )
        yield Suspicion(names_of(left), evidence, case.recalibrate(left), case.corrected(left))
