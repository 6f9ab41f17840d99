"""The moments of what each norm meets while a model runs, and what the norms normalize by meanwhile."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.errors import NonFiniteError
from batchnorm.moments import Moments, expand_mask
from batchnorm.nn.calling import below_autograd
from batchnorm.statistics.estimators import Estimator
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.sites import Site, Sites
from batchnorm.statistics.spread import Spread

__all__ = ["Collector", "OnBatch", "OnStored", "Tally"]

_CHUNK = 1 << 20
"""How many values are turned into float64 at a time: 8 MiB, whatever the size of the batch."""


@dataclass
class Tally:
    """What one site has met so far.

    Attributes:
        estimator: the moments.
        eps: what the norm adds to the variance.
        batches: in how many batches it met values.
        calls: how many times it was called on values; more than ``batches`` if several times in one forward pass.
        single_calls: how many of them brought a single value to some channel.
        spread: how far the batches are apart.
    """

    estimator: Estimator
    eps: float
    batches: int = 0
    calls: int = 0
    single_calls: int = 0
    spread: Spread = field(default_factory=Spread)
    _last_batch: int = -1

    def add(self, met: Moments, batch: int, *, any_values: bool = True) -> None:
        """Take in what one call was given, in the batch of that index."""
        self.estimator.add(met)
        if not any_values:
            return
        again = self._last_batch == batch
        self.spread.add(met, same_batch=again)
        self.calls += 1
        self.batches += not again
        self._last_batch = batch


class Collector(TorchDispatchMode):
    """Measures what the chosen norms of a model meet; by what they normalize it, a subclass says.

    Their buffers are left alone; every other norm runs as it would without this mode, except that it cannot update its
    buffers either. Nothing is attached to the model, so whatever calls a batch norm operator is seen: modules,
    subclasses with a forward of their own, functional calls, scripted modules, exported programs.

    Attributes:
        tallies: what each site has met.
    """

    def __init__(self, sites: Sites, estimator: type[Estimator]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tallies: dict[Site, Tally] = {}
        self._sites = sites
        self._estimator = estimator
        self._batch = 0
        self._failure: NonFiniteError | None = None

    def run(self, batch: int, call: Callable[[], Any]) -> None:
        """Call ``call``, which runs the model on the batch of that index, and measure.

        Raises:
            NonFiniteError: a norm met NaN or infinity.
        """
        self._batch = batch
        try:
            with below_autograd(), self:
                call()
        except Exception:
            if self._failure is None:
                raise
        # a scripted module turns every exception into a RuntimeError of its own, and a model may swallow it
        if self._failure is not None:
            raise self._failure

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        call = NormCall.of(func, args, kwargs or {})
        if call is None:
            return func(*args, **(kwargs or {}))
        site = self._sites.find(call.running_mean, call.running_var)
        return call.run() if site is None else self._measure(site, call)

    def _measure(self, site: Site, call: NormCall) -> Any:
        met = _moments(call.input, call.mask)
        self._require_finite(site, call, met)
        tally = self.tallies.get(site)
        if tally is None:
            estimator = self._estimator(met.num_features, call.input.device)
            tally = self.tallies[site] = Tally(estimator, call.eps)
        tally.add(met, self._batch, any_values=_counts(call.input, met, call.mask)[1] > 0)
        return self._normalize(site, call, met, tally)

    @abstractmethod
    def _normalize(self, site: Site, call: NormCall, met: Moments, tally: Tally) -> Any:
        """Run the call, by whatever statistics; ``met`` is what it was given and is part of the tally already."""

    def _require_finite(self, site: Site, call: NormCall, met: Moments) -> None:
        bad = ~met.isfinite()
        if bool(bad.any()):
            channels = bad.nonzero().flatten().tolist()
            listed = ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")
            self._failure = NonFiniteError(
                f"{site.name or 'the norm'} met NaN or infinity in {len(channels)} of its {met.num_features} channels "
                f"({listed})"
            )
            raise self._failure


class OnBatch(Collector):
    """The norms run as in training: on the mean and the biased variance (divisor m) of what they are given.

    In a channel that is given a single value there is no variance: it is normalized by the moments of everything the
    norm met so far, that value included; if it is the very first, by the stored statistics.
    """

    def _normalize(self, site: Site, call: NormCall, met: Moments, tally: Tally) -> Any:
        mean, variance = met.mean, met.variance()
        if _counts(call.input, met, call.mask)[0] < 2:
            tally.single_calls += 1
            mean, variance = _with_fallback(met, tally.estimator.pooled, site)
        dtype = torch.promote_types(site.running_mean.dtype, torch.float32)
        return call.run_on(mean.to(dtype), variance.to(dtype))


class OnStored(Collector):
    """The norms run as they would without this mode: in eval mode, on the stored statistics."""

    def _normalize(self, site: Site, call: NormCall, met: Moments, tally: Tally) -> Any:
        return call.run()


def _moments(x: Tensor, mask: Tensor | None) -> Moments:
    """Return the moments of ``x``, (N, C, ...), a few samples at a time."""
    if x.numel() <= _CHUNK:
        return Moments.of(x, mask=mask)
    samples = max(1, _CHUNK * len(x) // x.numel())
    masks = repeat(None) if mask is None else expand_mask(mask, x, 1).split(samples)
    parts = (Moments.of(part, mask=part_mask) for part, part_mask in zip(x.split(samples), masks, strict=False))
    return reduce(Moments.merge, parts)


def _counts(x: Tensor, met: Moments, mask: Tensor | None) -> tuple[int, int]:
    """Return the smallest and the largest number of values of a channel."""
    if mask is None:  # known without waiting for the device
        count = x.numel() // max(1, met.num_features)
        return count, count
    return int(met.count.min()), int(met.count.max())


def _with_fallback(met: Moments, pooled: Moments, site: Site) -> tuple[Tensor, Tensor]:
    """Return what to normalize by, channel by channel: the batch's moments, the pooled ones, or the stored ones."""
    stored_mean = site.running_mean.detach().reshape(-1).double()
    stored_variance = site.running_var.detach().reshape(-1).double()
    mean = torch.where(pooled.count > 1, pooled.mean, stored_mean)
    variance = torch.where(pooled.count > 1, pooled.variance(correction=1), stored_variance)
    enough = met.count > 1
    return torch.where(enough, met.mean, mean), torch.where(enough, met.variance(), variance)
