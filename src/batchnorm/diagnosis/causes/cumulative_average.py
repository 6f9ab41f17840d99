"""An average over everything since the first batch."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Severity, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of

__all__ = ["CumulativeAverage"]


class CumulativeAverage(Cause):
    r"""``momentum=None`` while the weights were learning: the first batches count as much as the last.

    What it finds:
        A gap in norms whose momentum is None. After t batches they store

        .. math:: \frac1t \sum_{i=1}^{t} \mathrm{batch}_i

        which is right for weights that stand still, and an average over all the weights there ever were for those that
        learn. A gap of 0.1 standard deviations is enough here: no moving average lags behind. It is doubtful where no
        gap is as large as for other norms.

    What excludes it:
        A momentum. Statistics that fit the training batches. Norms that the user froze.

    Evidence:
        The batches counted, and the gap.

    Cure:
        Measure the statistics once the training is done; train with a momentum, 0.1 for example.
    """

    key = "cumulative_average"

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all such layers."""
        found = [layer for layer in case.off if layer.momentum is None and layer.num_batches_tracked]
        if not found:
            return
        found = [layer for layer in case.everywhere(found) if layer in found or layer.momentum is None]
        case.explained.update(names_of(found))
        severity: Severity | None = None if any(layer.excess() > case.gaps.threshold for layer in found) else "doubtful"
        first = max(found, key=lambda layer: layer.distance)
        evidence = (
            f"momentum=None averages over all {first.num_batches_tracked} batches since the first, whose weights were "
            f"others; the gap of {first.name or 'the norm'} is {first.distance:.2g} standard deviations "
            f"({len(found)} of {len(case.layers)} norms)."
        )
        yield Suspicion(names_of(found), evidence, case.recalibrate(found), case.corrected(found), severity=severity)
