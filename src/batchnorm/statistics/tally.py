"""What one norm has met so far, in one process and in several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.statistics.estimators import Estimator
from batchnorm.statistics.parts import Parts
from batchnorm.statistics.ranks import Ranks
from batchnorm.statistics.sites import Site, Sites
from batchnorm.statistics.spread import Spread, errors_of

__all__ = ["Tally", "merge_spreads", "merge_tallies"]


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
        stored: mean and variance that the buffers are to hold in place of the estimator's: what a norm normalized by
            that is called several times in a forward pass, while what comes after it was measured.
    """

    estimator: Estimator
    eps: float
    batches: int = 0
    calls: int = 0
    single_calls: int = 0
    spread: Spread = field(default_factory=Spread)
    stored: tuple[Tensor, Tensor] | None = None
    _deviations: Tensor | None = None  # of all processes, where there are several

    def add(self, met: Moments, batch: int, *, first: bool, fewest: int, most: int) -> None:
        """Take in what one call was given.

        Args:
            met: its moments.
            batch: the index of the batch.
            first: whether it is the first call in this batch.
            fewest: the smallest number of values of a channel.
            most: the largest.
        """
        self.estimator.add(met)
        if most == 0:
            return
        self.spread.add(met, batch)
        self.calls += 1
        self.batches += first
        self.single_calls += fewest < 2

    def add_parts(self, met: Parts, batch: int, *, first: bool) -> None:
        """Take in what one call was given for many batches that follow each other.

        Args:
            met: the moments of each.
            batch: the index of the first of them.
            first: whether it is the first call in these batches.
        """
        self.estimator.add_parts(met)
        if met.count == 0:
            return
        self.spread.add_parts(met, batch)
        self.calls += len(met)
        self.batches += first * len(met)
        self.single_calls += (met.count < 2) * len(met)

    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Return those of the mean and of the variance, float64, shape (C,); infinite after a single batch."""
        if self._deviations is not None:
            return errors_of(self._deviations)
        return self.spread.standard_errors()

    def uncertainty(self) -> Tensor:
        r"""Return how uncertain mean and variance are in each channel, (C,).

        .. math:: \max\!\left(\frac{\mathrm{se}(\mathrm{mean})}{\sqrt{v + \epsilon}},
            \frac{\mathrm{se}(v)}{v + \epsilon}\right)

        with v the pooled variance (divisor n).
        """
        mean, variance = self.standard_errors()
        scale = self.estimator.pooled.variance().to(mean.device) + self.eps
        return (mean / scale.sqrt()).maximum(variance / scale)

    def overall_uncertainty(self) -> float:
        """Return the root mean square of the uncertainty over the channels."""
        return float(self.uncertainty().square().mean().sqrt())


def merge_tallies(ranks: Ranks, sites: Sites, tallies: Mapping[Site, Tally]) -> dict[Site, Tally]:
    """Return what all processes have met together, the same bits in each of them.

    A process that did not meet a norm which another one met takes part with nothing. The spread stays that of this
    process until :func:`merge_spreads`.
    """
    if ranks.size == 1:
        return dict(tallies)
    mine = {site.address: replace(t, estimator=t.estimator.to("cpu"), spread=Spread()) for site, t in tallies.items()}
    replies = ranks.agree(mine)
    merged = {}
    for address in dict.fromkeys(address for reply in replies for address in reply):
        site = sites.at(address)
        total = reduce(_merge, (reply[address] for reply in replies if address in reply))
        device = site.running_mean.device
        here = tallies.get(site)
        spread = Spread() if here is None else here.spread
        merged[site] = replace(total, estimator=total.estimator.to(device), spread=spread)
    return merged


def merge_spreads(ranks: Ranks, tallies: Mapping[Site, Tally]) -> None:
    """Tell each merged tally how far the batches of all processes are apart."""
    if ranks.size == 1:
        return
    mine: dict[Any, Tensor] = {}
    for site, tally in tallies.items():
        mine[site.address] = tally.spread.deviations(tally.estimator.pooled).cpu()
    replies = ranks.agree(mine)
    for site, tally in tallies.items():
        tally._deviations = _sum(reply[site.address] for reply in replies)


def _merge(a: Tally, b: Tally) -> Tally:
    return replace(
        a,
        estimator=a.estimator.merge(b.estimator),
        batches=a.batches + b.batches,
        calls=a.calls + b.calls,
        single_calls=a.single_calls + b.single_calls,
    )


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(lambda a, b: a + b, tensors)
