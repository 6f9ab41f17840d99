"""Population statistics in the sequential order: sweeps until every norm is measured as inference will meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from math import ceil, exp, inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.errors import BatchNormError, NonFiniteError, StateError
from batchnorm.functional.measure import moments_of
from batchnorm.models.calling import Forward, below_autograd
from batchnorm.moments import Moments
from batchnorm.statistics.collect import require_finite
from batchnorm.statistics.estimators import Estimator
from batchnorm.statistics.failures import explained
from batchnorm.statistics.outcome import Outcome
from batchnorm.statistics.ranks import Ranks
from batchnorm.statistics.sequential.disk_cache import DiskCache
from batchnorm.statistics.sequential.fixed_point import Settling, distance
from batchnorm.statistics.sequential.groups import Groups
from batchnorm.statistics.sequential.order import order_of
from batchnorm.statistics.sequential.parked_runs import Waiting
from batchnorm.statistics.sequential.replayable_batches import ReplayableBatches, tensors_of
from batchnorm.statistics.sequential.resident import Resident
from batchnorm.statistics.sequential.run import ModelRun, Stuck
from batchnorm.statistics.sequential.sweep import BatchInFlight, Disturbed, RunFailed, Sweep
from batchnorm.statistics.sequential.thread_context import ThreadContext
from batchnorm.statistics.sites import Address, Site, Sites
from batchnorm.statistics.stream import empty_stream
from batchnorm.statistics.tally import Tally, merge_spreads
from batchnorm.statistics.values import Statistics, statistics_of

__all__ = ["Sequential"]

_MOST_SWEEPS = 40
_STILL = 1e-6
"""Pinned statistics that move by less than this (in standard deviations, and relative) have come to rest."""
_TINY = torch.finfo(torch.float64).tiny
_SAME = 1e-3
"""Two runs of one batch that differ by more than this, in the same units, were disturbed."""
_PER_WITNESS = 16
"""Of so many batches that were joined, one is run again by itself."""
_FIRST = 16
"""With a tolerance, so many batches are measured first, to tell how many it takes."""


class Sequential:
    """Measures a model in the sequential order.

    Args:
        model: in the modes of inference.
        call: runs it on a batch.
        sites: the norms to measure.
        estimator: of their moments.
        ranks: the processes that measure together.
        limit: how many bytes the waiting batches may take.
        cache: a folder for those beyond; None runs them again instead.
    """

    def __init__(
        self,
        model: Module,
        call: Forward,
        sites: Sites,
        estimator: type[Estimator],
        ranks: Ranks,
        *,
        limit: float,
        cache: str | Path | None,
    ) -> None:
        self._model = model
        self._call = call
        self._sites = sites
        self._estimator = estimator
        self._ranks = ranks
        self._limit = limit
        self._cache = cache
        self._ambient = ThreadContext()
        # elsewhere the bytes of the tensors are counted
        on_cpu = all(t.device.type == "cpu" for t in (*model.parameters(), *model.buffers()))
        self._resident = Resident() if on_cpu else None
        self._tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._joins = True
        self._joined = False  # whether any batches were, in the last sweep
        self._apart = False
        self._notes: list[str] = []

    def measure(self, stream: Iterable[Any], tolerance: float | None, advance: Callable[[], None]) -> Outcome:
        """Measure the stream, or as much of it as the tolerance asks for.

        Raises:
            BatchNormError: see :func:`batchnorm.statistics.recalibrate.recalibrate`.
        """
        inputs = ReplayableBatches(stream, self._limit, allow_empty=self._ranks.size > 1)
        number = None if tolerance is None else _FIRST
        while True:
            sweep = self._settle(inputs, number, advance)
            merge_spreads(self._ranks, sweep.tallies)
            used = sweep.batches
            outcome = Outcome(sweep.tallies, sum(self._ranks.agree(used)), tuple(self._notes))
            if outcome.batches == 0:
                raise empty_stream("recalibrate", type(stream).__name__)
            if tolerance is None or outcome.uncertainty <= tolerance or all(self._ranks.agree(inputs.ended)):
                return outcome
            assert number is not None
            number = _more(number, outcome.uncertainty / tolerance)

    # -- sweeps --------------------------------------------------------------------------------------------------------

    def _settle(self, inputs: ReplayableBatches, number: int | None, advance: Callable[[], None]) -> Sweep:
        """Sweep until no norm was measured too early, and none that is called several times moves any more."""
        pinned: dict[Site, Statistics] = {}
        order: list[Address] = []
        settling: Settling | None = None
        least, best = inf, None
        for _ in range(_MOST_SWEEPS):
            try:
                sweep = self._sweep(inputs, number, pinned, order, advance)
            except NonFiniteError:
                if settling is None or self._ranks.size > 1:  # the other processes have not failed
                    raise
                pinned = {**pinned, **settling.retreat(pinned)}
                continue
            if any(self._ranks.agree(bool(sweep.late))):
                ways = [way for ways in self._ranks.agree(_ways(sweep)) for way in ways]
                order, without = order_of(ways)
                start = {self._sites.at(address) for address in sorted(without)}
                pinned = {site: pinned.get(site) or sweep.final[site] for site in start}
                settling, least, best = None, inf, None
                continue
            used = {site: pinned[site] for site in sweep.met_pinned()}
            if not used:
                return sweep
            most = max(max(sweep.moves_of(site)) for site in used)
            if best is None or most < least:
                least, best = most, sweep
            if all(_still(sweep, site) for site in used):
                return sweep.keeping_pinned()
            if settling is None or settling.sites != set(used):
                settling = Settling({site: sweep.tallies[site].eps for site in used})
            met = {site: statistics_of(site, sweep.tallies[site]) for site in used}
            # one process decides: the others might round otherwise
            pinned = {**pinned, **self._agreed(settling.next(used, met))}
        if best is None:
            raise StateError(
                "recalibrate: the way that batches take through the norms changes with the statistics, so that there "
                "is no order in which to measure them. Use order='parallel'. The model is as it was."
            )
        self._notes.append(_unsettled(best))
        return best.keeping_pinned()

    def _agreed(self, statistics: dict[Site, Statistics]) -> dict[Site, Statistics]:
        mine = {site.address: tuple(t.cpu() for t in values) for site, values in statistics.items()}
        first = self._ranks.agree(mine)[0]
        return {
            site: (first[site.address][0].to(mean.device), first[site.address][1].to(mean.device))
            for site, (mean, _) in statistics.items()
        }

    def _sweep(
        self,
        inputs: ReplayableBatches,
        number: int | None,
        pinned: dict[Site, Statistics],
        order: Sequence[Address],
        advance: Callable[[], None],
    ) -> Sweep:
        """Sweep once; again without joining them, then with the batches kept apart, if they disturb each other."""
        while True:
            try:
                sweep = self._sweep_once(inputs, number, pinned, order, advance)
                if all(self._ranks.agree(self._undisturbed(sweep, inputs))):
                    return sweep
            except Disturbed:
                pass
            if any(self._ranks.agree(self._joined)):
                self._joins = False
            elif not self._apart:
                self._apart = True
                self._notes.append(
                    "The model keeps something of a batch, or a lock, between its layers, so that batches cannot wait "
                    "side by side: each was run again for every norm."
                )
            else:
                raise StateError(
                    "recalibrate: the model gives another result when the same batch is run again, in eval mode: it "
                    "draws random numbers of its own, or remembers earlier batches. order='sequential' cannot measure "
                    "it; use order='parallel'. The model is as it was."
                )

    def _sweep_once(
        self,
        inputs: ReplayableBatches,
        number: int | None,
        pinned: dict[Site, Statistics],
        order: Sequence[Address],
        advance: Callable[[], None],
    ) -> Sweep:
        with ExitStack() as stack:
            shelf = None
            if self._cache is not None and not self._apart:
                shelf = stack.enter_context(DiskCache(self._cache))
            waiting = Waiting(
                lambda: 0 if self._apart else self._limit - inputs.nbytes, self._fits, shelf, apart=self._apart
            )

            def start(index: int, batch: Any) -> ModelRun:
                return self._start(index, batch, shelf, held=inputs.held)

            groups = Groups(self._call, self._limit, joins=self._joins and not self._apart)
            sweep = Sweep(
                *(start, self._sites, self._estimator, self._ranks, waiting, pinned, order),
                apart=self._apart,
                copied=groups.copied,
            )
            stack.callback(sweep.close)
            self._joined = False
            try:
                for group in groups.of(_first(inputs, number), lambda: len(sweep.travellers)):
                    self._joined |= len(group) > 1
                    sweep.begin(group)
                    group.clear()
                sweep.finish(inputs, advance)
            except RunFailed as failure:
                raise self._explained(failure.index, failure.error, inputs) from failure.error
            except Disturbed:
                own = sweep.failure
                if own is not None and not own.joined and not isinstance(own.error, Stuck):
                    error = self._fails_alone(sweep, inputs, own.index, shelf)
                    if error is not None:
                        raise self._explained(own.index, error, inputs) from error
                raise
            return sweep

    def _explained(self, index: int, error: Exception, inputs: ReplayableBatches) -> BatchNormError:
        return explained("recalibrate", error, self._model, index, inputs.one(index), self._call)

    def _start(self, index: int, batch: Any, shelf: DiskCache | None, *, held: bool = True) -> ModelRun:
        others = [*self._tensors, *tensors_of(batch)]
        before = None if shelf is None else shelf.require
        call = partial(self._call, self._model, batch)
        run = ModelRun(call, self._sites, self._ambient, others, seed=index, before_work=before)
        if not held:  # the run alone keeps the batch
            run.storages.hold(tensors_of(batch))
        return run

    def _fits(self) -> bool:
        return self._resident is None or self._resident.within(self._limit)

    # -- what may go wrong unseen --------------------------------------------------------------------------------------

    def _fails_alone(
        self, sweep: Sweep, inputs: ReplayableBatches, index: int, shelf: DiskCache | None
    ) -> Exception | None:
        """Return how a batch fails, run once more by itself, if it does: then no other batch is to blame."""
        run = self._start(index, inputs.one(index), shelf)
        try:
            run.start()
            with below_autograd():
                _goes_through(run, sweep)
            return None
        except Exception as error:
            return error
        finally:
            run.abandon()

    def _undisturbed(self, sweep: Sweep, inputs: ReplayableBatches) -> bool:
        """Return whether some batches, run once more by themselves, bring to each norm what they brought before."""
        if len(sweep.travellers) < 2:
            return True
        witnesses = _witnesses(sweep)
        batches = inputs.again(witnesses)
        return all(self._repeats(index, batch, witnesses[index], sweep) for index, batch in batches)

    def _repeats(self, index: int, batch: Any, traveller: BatchInFlight, sweep: Sweep) -> bool:
        run = self._start(index, batch, None)
        try:
            run.start()
            with below_autograd():
                return _repeats(run, index, traveller, sweep)
        except Exception:  # alone it fails: it is not the same run
            return False
        finally:
            run.abandon()


def _goes_through(run: ModelRun, sweep: Sweep) -> None:
    """Let a run go to the first norm where it would have to wait.

    Raises:
        Exception: the model fails, or makes values that are not finite.
    """
    arrival = run.go()
    while arrival is not None:
        require_finite(arrival.site.name, moments_of(arrival.call.input, arrival.call.mask))
        if not sweep.lets_pass(arrival.site):
            return
        arrival = run.go(arrival.call.run_on(*sweep.normalizes_by(arrival.site)))


def _first(inputs: ReplayableBatches, number: int | None) -> Iterator[tuple[int, Any]]:
    """Yield so many batches with their indices, those that were met before and new ones; None for all."""
    known = len(inputs) if number is None else min(number, len(inputs))
    yield from inputs.again(range(known))
    index = known
    while not inputs.ended and (number is None or index < number):
        batch = inputs.new()
        if not inputs.ended:
            yield index, batch
            del batch
            index += 1


def _witnesses(sweep: Sweep) -> dict[int, BatchInFlight]:
    """Return the batches that are run again, by their rising indices: the first of all, and some of those joined.

    Those are one of each group, for a batch that is unlike all others may change its neighbours alone; where groups are
    of fewer than ``_PER_WITNESS`` batches, of so many groups that no more is run again, evenly spaced. In any case some
    groups, and one of each size.
    """
    groups = sweep.joined
    number = min(len(groups), max(5, sum(t.number for t in groups) // _PER_WITNESS))
    some = [groups[i * (len(groups) - 1) // max(1, number - 1)] for i in range(number)]
    chosen = [sweep.travellers[0], *some, *{t.number: t for t in groups}.values()]
    return dict(sorted((index, t) for t in dict.fromkeys(chosen) for index in t.brought))


def _repeats(run: ModelRun, index: int, traveller: BatchInFlight, sweep: Sweep) -> bool:
    """Return whether the run of a batch brings to the norms what it brought before."""
    arrival = run.go()
    for site, before in zip(traveller.way, traveller.brought[index], strict=True):
        if arrival is None or arrival.site is not site:
            return False
        met, tally = moments_of(arrival.call.input, arrival.call.mask), sweep.tallies[site]
        if traveller.number == 1 and not _alike(before, met, tally.eps):
            return False
        if traveller.number > 1 and not _alike_in(tally, before, met, arrival.call.input.dtype):
            return False
        arrival = run.go(arrival.call.run_on(*sweep.normalizes_by(site)))
    return arrival is None


def _ways(sweep: Sweep) -> list[tuple[Address, ...]]:
    return list(dict.fromkeys(tuple(site.address for site in t.way) for t in sweep.travellers))


def _still(sweep: Sweep, site: Site) -> bool:
    """Return whether the statistics of a pinned norm move no more than they are rounded."""
    mean, variance = sweep.pinned[site]
    deviations = (variance.double() + sweep.tallies[site].eps).sqrt().clamp(min=_TINY)
    rounding = 4 * torch.finfo(site.running_var.dtype).eps * max(1.0, float((mean.double().abs() / deviations).max()))
    return max(sweep.moves_of(site)) <= max(_STILL, rounding)


def _unsettled(sweep: Sweep) -> str:
    """Say which norms did not come to rest, and what they hold."""
    listed = []
    for site in sweep.met_pinned():
        if not _still(sweep, site):
            mean, logarithm = sweep.moves_of(site)
            factor = f"a factor of {exp(min(logarithm, 700)):.3g}"
            listed.append(f"{site.name or 'the model'} (mean by {mean:.2g} standard deviations, variance by {factor})")
    return (
        f"{', '.join(listed)}: called several times in a forward pass, or before and after another norm, so that what "
        "it meets depends on its own statistics, and no statistics were found that agree with what they bring about. "
        f"It holds the best of {_MOST_SWEEPS} passes, and meets in eval mode what differs from that by as much as "
        "stands here. All other norms are measured behind what it holds. Give each call a norm of its own."
    )


def _alike(a: Moments, b: Moments, eps: float) -> bool:
    if a.num_features != b.num_features or not bool((a.count == b.count).all()):
        return False
    return distance((a.mean, a.variance().nan_to_num()), (b.mean, b.variance().nan_to_num()), eps) <= _SAME


def _alike_in(tally: Tally, a: Moments, b: Moments, dtype: torch.dtype) -> bool:
    """Return whether moments of a joined batch and of the batch by itself differ by rounding, beside all values.

    A sum over another number of samples is rounded otherwise: by some units in the last place, which grow on their way
    through the layers.
    """
    if a.num_features != b.num_features or not bool((a.count == b.count).all()):
        return False
    scale = (tally.estimator.pooled.variance() + tally.eps).clamp(min=_TINY)
    mean = (a.mean - b.mean).abs() / scale.sqrt()
    variance = (a.variance() - b.variance()).abs() / scale
    unit = torch.finfo(dtype).eps
    return float(mean.maximum(variance).max()) <= min(1000 * unit, max(8 * unit, 0.01))


def _more(number: int, factor: float) -> int:
    """Return how many batches it takes, by the law of 1/√n and a tenth more, if ``number`` were too uncertain."""
    if not isfinite(factor):
        return number * 4
    return max(number + 1, min(ceil(1.1 * number * factor**2), number * 64))
