"""What the norms of a model meet, and what they normalize by meanwhile: the batch, the stored statistics, or others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from batchnorm.functional.measure import moments_of
from batchnorm.moments import Moments, expand_mask
from batchnorm.nn.operators import eps_key
from batchnorm.statistics.collect import OnBatch
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.sites import Site, Sites
from batchnorm.statistics.tally import Tally

__all__ = ["Basis", "NormRecord", "NormRecorder", "Statistics"]

Statistics: TypeAlias = tuple[Tensor, Tensor]
"""Mean and unbiased variance, float64, (C,)."""

_MOST_CALLS = 8
"""So many calls within one forward pass are told apart."""


@dataclass(frozen=True)
class Basis:
    """What the norms normalize by.

    Attributes:
        default: the batch's own statistics, as in training; or the stored ones, as in eval mode.
        given: instead, statistics for these norms: one pair, or one pair for each call within a forward pass.
        eps: instead of their own, for these norms.
    """

    default: Literal["batch", "stored"]
    given: Mapping[Site, Sequence[Statistics]] = field(default_factory=dict)
    eps: Mapping[Site, float] = field(default_factory=dict)


@dataclass
class NormRecord(Tally):
    """What one norm met in a pass.

    Attributes:
        per_call: the moments of its first call in each forward pass, of its second, ...
        per_batch: the moments of its first batches.
        weight: its γ, as the call was given it.
        bias: its β, likewise.
        samples: how many samples it met, over all calls.
        fewest: the smallest number of values that one call brought to a channel.
        feeder: the weight of the last linear operator before it.
        on_batch: whether it asked for the batch's statistics by itself.
    """

    per_call: list[Moments] = field(default_factory=list)
    per_batch: list[Moments] = field(default_factory=list)
    weight: Tensor | None = None
    bias: Tensor | None = None
    samples: int = 0
    fewest: int = 0
    feeder: Tensor | None = None
    on_batch: bool = False
    _call_in_batch: int = 0
    _last_batch: int = -1

    def take(self, parts: Sequence[Moments], batch: int, call: NormCall) -> Moments:
        """Take in one call, in groups of samples, and return its moments."""
        met = reduce(Moments.merge, parts)
        again = self._last_batch == batch
        self._call_in_batch = self._call_in_batch + 1 if again else 0
        if self._call_in_batch == len(self.per_call) < _MOST_CALLS:
            self.per_call.append(Moments.zero(met.num_features, met.count.device))
        slot = min(self._call_in_batch, _MOST_CALLS - 1)
        self.per_call[slot] = self.per_call[slot].merge(met)
        if not again and len(self.per_batch) < _MOST_CALLS * 8:
            self.per_batch.append(met)
        self.estimator.add(met)
        for index, part in enumerate(parts):  # groups of samples, so that one batch tells something of the noise too
            self.spread.add(part, batch * len(parts) + index)
        self.calls += 1
        self.batches += not again
        self._last_batch = batch
        size = int(met.count.min())
        self.fewest = size if self.calls == 1 else min(self.fewest, size)
        self.samples += len(call.input)
        return met

    @property
    def statistics(self) -> Statistics:
        """Mean and unbiased variance (divisor n − 1) of everything it met."""
        return self.estimator.statistics()

    @property
    def call_in_batch(self) -> int:
        """Which call of the norm this is within the forward pass, from 0."""
        return self._call_in_batch


class NormRecorder(OnBatch):
    """Measures every norm while it normalizes by a chosen basis.

    Args:
        sites: the norms.
        basis: what they normalize by.
        groups_a_batch: into how many groups of samples a batch is cut, for the standard errors.
        tolerant: let NaN and infinity pass; otherwise they are an error.
    """

    def __init__(self, sites: Sites, basis: Basis, *, groups_a_batch: int = 1, tolerant: bool = False) -> None:
        super().__init__(sites, Pooled)
        self.records: dict[Site, NormRecord] = {}
        self._basis = basis
        self._groups_a_batch = groups_a_batch
        self._tolerant = tolerant
        self._feeder: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = _weight_place(func)
        if place is not None and place < len(args):
            weight = args[place]
            if isinstance(weight, Tensor) and weight.dim() > 1:
                self._feeder = weight
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _measure(self, site: Site, call: NormCall) -> Any:
        parts = _parts(call.input, call.mask, self._groups_a_batch)
        if not self._tolerant:
            self._require_finite(site, reduce(Moments.merge, parts))
        record = self.records.get(site)
        if record is None:
            estimator = Pooled(parts[0].num_features, call.input.device)
            given = call.given
            record = self.records[site] = NormRecord(
                estimator, call.eps, weight=given.get("weight"), bias=given.get("bias"), feeder=self._feeder
            )
        met = record.take(parts, self._batch, call)
        record.on_batch |= bool(call.given.get("training", False))
        if site in self._basis.eps:
            call = NormCall(call.func, call.given | {eps_key(call.given): self._basis.eps[site]})
        return self._normalize(site, call, met, record)

    def _normalize(self, site: Site, call: NormCall, met: Moments, tally: Tally) -> Any:
        pairs = self._basis.given.get(site)
        if pairs is not None:
            assert isinstance(tally, NormRecord)
            mean, variance = pairs[min(tally.call_in_batch, len(pairs) - 1)]
            dtype = torch.promote_types(site.running_mean.dtype, torch.float32)
            return call.run_on(mean.to(call.input.device, dtype), variance.to(call.input.device, dtype))
        if self._basis.default == "stored":
            return call.run()
        return super()._normalize(site, call, met, tally)


@cache
def _weight_place(func: Any) -> int | None:
    """Return which argument of an operator is called its weight; that of a norm is no matrix."""
    names = [argument.name for argument in func._schema.arguments]
    return names.index("weight") if "weight" in names else None


def _parts(x: Tensor, mask: Tensor | None, groups: int) -> list[Moments]:
    """Return the moments of ``x``, (N, C, ...), in groups of neighbouring samples."""
    samples = max(1, -(-len(x) // groups))
    if mask is None:
        return [moments_of(part, None) for part in x.split(samples)]
    masks = expand_mask(mask, x, 1).split(samples)
    return [moments_of(part, inside) for part, inside in zip(x.split(samples), masks, strict=True)]
