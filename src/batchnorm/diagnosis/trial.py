"""What a cure would bring, tried on another basis: nothing is written into the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchnorm.diagnosis.case import Case, Remedy
from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.norm_record import Basis
from batchnorm.diagnosis.passes import Pass
from batchnorm.errors import NonFiniteError
from batchnorm.report.result import finite_or_none
from batchnorm.statistics.sites import Site

__all__ = ["Gain", "Trial", "outstanding", "try_remedy"]

_MOST = 3.0


@dataclass(frozen=True)
class Gain:
    """What a cure brings.

    Attributes:
        gap_before: mean over the norms of the distance between what they normalize by and what they meet, in eval mode.
        gap_after: the same after the cure.
        metric_before: the metric in eval mode; None if none was given.
        metric_after: the same after the cure.
        closed: the share of the way that the metric goes from eval mode to the better of batch statistics and
            population statistics; above 1 if it goes further, None where eval mode is as good as these. Without a
            metric, or where nobody knows whether more of it is better, the share of the gap that is closed.
    """

    gap_before: float
    gap_after: float
    metric_before: float | None
    metric_after: float | None
    closed: float | None

    def __str__(self) -> str:
        """Return it in a few words."""
        if self.metric_before is not None and self.metric_after is not None:
            return f"metric {self.metric_before:.4g} → {self.metric_after:.4g}"
        return f"mean gap {self.gap_before:.2g} → {self.gap_after:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return {name: finite_or_none(value) for name, value in vars(self).items()}


def outstanding(done: Pass, basis: Basis) -> float:
    """Return the mean over the norms of the distance between what they normalize by and what they meet; each at most 3.

    A norm that normalizes by the batch has none.
    """
    distances = []
    for site, record in done.records.items():
        if record.on_batch and site not in basis.given:
            continue
        pairs = basis.given.get(site) or [_stored(site)]
        mets = record.per_call if len(pairs) > 1 else [record.estimator.pooled]
        each = [
            layer_distance((pair[0], pair[1]), (met.mean, met.variance(correction=1)), record.eps)
            for pair, met in zip(pairs, mets, strict=False)
        ]
        distances.append(min(max(each), _MOST))
    return sum(distances) / max(len(distances), 1)


def _stored(site: Site) -> tuple[Any, Any]:
    mean, variance = site.running_mean.detach(), site.running_var.detach()
    return mean.reshape(-1).double(), variance.reshape(-1).double()


@dataclass(frozen=True)
class Trial:
    """A run as the cure would leave the model, and what that brings."""

    done: Pass
    gain: Gain


def try_remedy(case: Case, remedy: Remedy) -> Trial | None:
    """Return what a cure brings; None if it cannot be tried, or the model meets NaN on the way."""
    if remedy.trial is None:
        return None
    passes = case.passes
    if remedy.change is not None:
        passes = passes.over([remedy.change(batch) for batch in passes.batches], measured=True)
    deployed = case.gaps.deployed
    try:
        cured = passes.run(remedy.trial)
    except NonFiniteError:  # another layer is poisoned too
        return None
    before, after = outstanding(deployed, Basis("stored")), outstanding(cured, remedy.trial)
    of_gap = 1 - after / before if before > 0 else None
    closed = case.goal.closed(cured) if case.goal.known else of_gap
    return Trial(cured, Gain(before, after, deployed.metric, cured.metric, closed))
