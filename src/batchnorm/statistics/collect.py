"""The moments of what each norm meets while a model runs, and what the norms normalize by meanwhile."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from batchnorm.errors import NonFiniteError, ShapeError
from batchnorm.functional.measure import moments_of
from batchnorm.models.calling import below_autograd
from batchnorm.moments import Moments
from batchnorm.observers import OperatorMode
from batchnorm.statistics.estimators import Estimator
from batchnorm.statistics.operators import NormCall, run_with_functions
from batchnorm.statistics.sites import Site, Sites
from batchnorm.statistics.tally import Tally

__all__ = ["Collector", "OnBatch", "counts_of", "require_channels", "require_finite"]


class Collector(OperatorMode):
    """Measures what the chosen norms of a model meet; by what they normalize it, a subclass says.

    Their buffers are left alone; every other norm runs as it would without this mode, except that it cannot update its
    buffers either. Nothing is attached to the model, so whatever calls a batch norm operator is seen: modules,
    subclasses with a forward of their own, functional calls, scripted modules, exported programs.

    Attributes:
        tallies: what each site has met.
    """

    supports_higher_order_operators = True

    def __init__(self, sites: Sites, estimator: type[Estimator]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tallies: dict[Site, Tally] = {}
        self._sites = sites
        self._estimator = estimator
        self._batch = 0
        self._last_batches: dict[Site, int] = {}
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
        if isinstance(func, HigherOrderOperator):
            return run_with_functions(self, func, args, kwargs or {})
        call = NormCall.of(func, args, kwargs or {})
        if call is None:
            return func(*args, **(kwargs or {}))
        site = self._sites.find(call.running_mean, call.running_var)
        return call.run() if site is None else self._measure(site, call)

    def _measure(self, site: Site, call: NormCall) -> Any:
        met = moments_of(call.input, call.mask)
        self._require_finite(site, met)
        tally = self.tallies.get(site)
        if tally is None:
            estimator = self._estimator(met.num_features, call.input.device)
            tally = self.tallies[site] = Tally(estimator, call.eps)
        fewest, most = counts_of(call.input, met, call.mask)
        first = self._last_batches.get(site) != self._batch
        tally.add(met, self._batch, first=first, fewest=fewest, most=most)
        if most > 0:
            self._last_batches[site] = self._batch
        return self._normalize(site, call, met, tally)

    @abstractmethod
    def _normalize(self, site: Site, call: NormCall, met: Moments, tally: Tally) -> Any:
        """Run the call, by whatever statistics; ``met`` is what it was given and is part of the tally already."""

    def _require_finite(self, site: Site, met: Moments) -> None:
        try:
            require_finite(site.name, met)
        except NonFiniteError as error:
            self._failure = error
            raise


class OnBatch(Collector):
    """The norms run as in training: on the mean and the biased variance (divisor m) of what they are given.

    In a channel that is given a single value there is no variance: it is normalized by the moments of everything the
    norm met so far, that value included; if it is the very first, by the stored statistics.
    """

    def _normalize(self, site: Site, call: NormCall, met: Moments, tally: Tally) -> Any:
        mean, variance = met.mean, met.variance()
        if counts_of(call.input, met, call.mask)[0] < 2:
            mean, variance = _with_fallback(met, tally.estimator.pooled, site)
        dtype = torch.promote_types(site.running_mean.dtype, torch.float32)
        return call.run_on(mean.to(dtype), variance.to(dtype))


def require_channels(site: Site, met: Moments) -> None:
    """Refuse what a norm met if it has other channels than the norm.

    Raises:
        ShapeError: it has.
    """
    expected = site.running_mean.numel()
    if met.num_features != expected:
        raise ShapeError(f"{site.name or 'the norm'}: expected {expected} channels; got {met.num_features}")


def require_finite(name: str, met: Moments) -> None:
    """Refuse what a norm, or another place of a model, met if some of it is not finite.

    Raises:
        NonFiniteError: it is not; the message lists the channels.
    """
    bad = ~met.isfinite()
    if bool(bad.any()):
        channels = bad.nonzero().flatten().tolist()
        listed = ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")
        raise NonFiniteError(
            f"{name or 'the norm'} met NaN or infinity in {len(channels)} of its {met.num_features} channels ({listed})"
        )


def counts_of(x: Tensor, met: Moments, mask: Tensor | None) -> tuple[int, int]:
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
