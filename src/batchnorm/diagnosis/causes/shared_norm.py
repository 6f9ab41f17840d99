"""One set of statistics for two inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, module_line, names_of
from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.gaps import LayerGap
from batchnorm.diagnosis.norm_record import Basis, Statistics
from batchnorm.moments import Moments

__all__ = ["SharedNorm"]

_APART = 0.5
_TIGHT = 0.35
"""Batches of one kind are closer to each other than this share of the distance between the two kinds."""


class SharedNorm(Cause):
    """One norm that serves two inputs of different distribution.

    What it finds:
        A norm that is called several times in one forward pass on inputs whose statistics are more than half a standard
        deviation apart; or whose batches come in two kinds, each alike and both apart, while the stored statistics fit
        neither. In training each call, each batch, is normalized by its own statistics. In eval mode all get the
        average, which is right for none.

    What excludes it:
        Stored statistics that fit one of the two inputs.

    Evidence:
        The distance between the calls, or the kinds, and of the stored statistics from each.

    Cure:
        A norm of its own for each input.
    """

    key = "shared_norm"
    excluded_at_home = False
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for norms called on several inputs, one for batches of two kinds."""
        called = [layer for layer in case.layers if _between_calls(layer) > _APART and layer.name not in case.explained]
        if called:
            yield self._called(case, called)
        elif case.layers:
            yield from self._kinds(case, case.layers[0])

    def _called(self, case: Case, found: list[LayerGap]) -> Suspicion:
        first = found[0]
        case.explained.update(names_of(case.off))
        calls = [_statistics(met) for met in first.record.per_call]
        off = ", ".join(f"{_from_stored(first, call):.2g}" for call in calls[:4])
        evidence = (
            f"Called {len(calls)} times in one forward pass, on inputs up to {_between_calls(first):.2g} standard "
            f"deviations apart; the stored statistics are {off} from them ({len(found)} of {len(case.layers)} norms)."
        )
        each = {layer.site: [_statistics(met) for met in layer.record.per_call] for layer in found}
        return Suspicion(names_of(found), evidence, _own(first), Basis("stored", each))

    def _kinds(self, case: Case, first: LayerGap) -> Iterator[Suspicion]:
        kinds = _two_kinds(first.record.per_batch, first.eps)
        if kinds is None or first.name in case.explained:
            return
        distances = [_from_stored(first, _statistics(kind)) for kind in kinds]
        if min(distances) < case.gaps.threshold:
            return
        case.explained.update(names_of(case.off))
        apart = layer_distance(_statistics(kinds[0]), _statistics(kinds[1]), first.eps)
        evidence = (
            f"The batches are of two kinds, {apart:.2g} standard deviations apart; the stored statistics are "
            f"{distances[0]:.2g} and {distances[1]:.2g} from them, and right for neither."
        )
        yield Suspicion([first.name], evidence, _own(first))


def _own(layer: LayerGap) -> str:
    return f"second = __import__('copy').deepcopy({module_line(layer.name)})  # one for each input, then recalibrate"


def _statistics(met: Moments) -> Statistics:
    return met.mean.cpu(), met.variance(correction=1).cpu()


def _from_stored(layer: LayerGap, met: Statistics) -> float:
    return layer_distance(layer.stored, met, layer.eps)


def _between_calls(layer: LayerGap) -> float:
    """Return the largest distance between two calls within a forward pass."""
    calls = [_statistics(met) for met in layer.record.per_call]
    return max((layer_distance(a, b, layer.eps) for a, b in combinations(calls, 2)), default=0.0)


def _two_kinds(batches: Sequence[Moments], eps: float) -> tuple[Moments, Moments] | None:
    """Return the moments of two kinds of batches, if there are two, each at least twice."""
    most = max((float(batch.count.min()) for batch in batches), default=0.0)
    batches = [batch for batch in batches if 2 * float(batch.count.min()) >= max(most, 4.0)]  # not a last, smaller one
    if len(batches) < 4:
        return None
    each = [_statistics(batch) for batch in batches]
    distance = torch.tensor([[layer_distance(a, b, eps) for b in each] for a in each], device="cpu")
    seed = int(distance.max(1).values.argmax())
    other = int(distance[seed].argmax())
    near = distance[seed] < distance[other]
    if not 2 <= int(near.sum()) <= len(batches) - 2:
        return None
    between = float(distance[near][:, ~near].min())
    within = max(float(distance[near][:, near].max()), float(distance[~near][:, ~near].max()))
    if between < _APART or within > _TIGHT * between:
        return None
    first, second = (
        [batch for batch, is_near in zip(batches, near.tolist(), strict=True) if is_near is kind]
        for kind in (True, False)
    )
    return _sum(first), _sum(second)


def _sum(batches: Sequence[Moments]) -> Moments:
    total = batches[0]
    for batch in batches[1:]:
        total = total.merge(batch)
    return total
