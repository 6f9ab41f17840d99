"""All batches on their way through the model side by side, from norm to norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from batchnorm.functional.measure import moments_of
from batchnorm.models.calling import below_autograd
from batchnorm.moments import Moments
from batchnorm.statistics.collect import counts_of, require_channels, require_finite
from batchnorm.statistics.estimators import Estimator
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.parts import Parts
from batchnorm.statistics.ranks import Ranks
from batchnorm.statistics.sequential.fixed_point import distances
from batchnorm.statistics.sequential.groups import Group, joined
from batchnorm.statistics.sequential.parked_runs import Waiting
from batchnorm.statistics.sequential.replayable_batches import ReplayableBatches
from batchnorm.statistics.sequential.run import Arrival, ModelRun, Stuck
from batchnorm.statistics.sites import Address, Site, Sites
from batchnorm.statistics.tally import Tally, merge_tallies
from batchnorm.statistics.values import Statistics, statistics_of

__all__ = ["BatchInFlight", "Disturbed", "RunFailed", "Sweep", "Unjoinable"]

_PATIENCE = 60.0
"""After so many seconds without an operator a batch is taken to wait for a lock that another one holds."""


_WITNESSES = 8
"""So many batches of the first group are run again by themselves, to see that nothing depends on their neighbours."""


class RunFailed(Exception):  # noqa: N818
    """The model failed on a batch, or on several that were joined, or what it made of it cannot be measured."""

    def __init__(self, traveller: BatchInFlight, error: Exception) -> None:
        super().__init__(traveller.index, error)
        self.index = traveller.index
        self.joined = traveller.number > 1
        self.error = error


class Disturbed(Exception):  # noqa: N818
    """A batch failed while others were on their way; perhaps because of them."""


class Unjoinable(Exception):  # noqa: N818
    """What came to a norm cannot be told apart by the batches that were joined."""


@dataclass(eq=False)
class BatchInFlight:
    """One batch, or several small ones that follow each other and were joined.

    Attributes:
        index: the place of the first in the stream.
        number: how many there are.
        counted: how many of its visits to each norm are in that norm's tally.
        way: the norms in the order of its visits.
        brought: what some of the batches brought there, by their index: a single batch only if it is the first.
        at: the norm that it waits at, whether its run is kept or not; None once it has left the model.
        arrival: the call that its run waits in, if it is kept.
    """

    index: int
    number: int = 1
    counted: Counter[Site] = field(default_factory=Counter)
    way: list[Site] = field(default_factory=list)
    brought: dict[int, list[Moments]] = field(default_factory=dict)
    at: Site | None = None
    run: ModelRun | None = None
    arrival: Arrival | None = None

    def __post_init__(self) -> None:
        """Choose the batches that are remembered: one, in another place from group to group; more where asked."""
        if self.index == 0:
            self.brought[0] = []
        elif self.number > 1:
            self.remember(1)

    def remember(self, number: int) -> None:
        """Remember so many of the batches, evenly spaced."""
        for k in range(number):
            place = (self.index + k * self.number // number) % self.number
            self.brought[self.index + place] = []

    @property
    def indices(self) -> range:
        """The places of the batches in the stream."""
        return range(self.index, self.index + self.number)


class Sweep:
    """Measures each norm on all batches, and sends them on with its final statistics.

    A batch goes as far as the first norm that is not final, adds what it brings to the norm's tally, and waits. When
    nobody can come to a norm any more it is made final, and all who wait there go on. Those whose memory does not fit
    (see :class:`Waiting`) do not wait: they start from the first layer again when it is their turn, and pass the norms
    that are final already. Either way a value is counted once.

    Args:
        start: begins a run of a batch.
        sites: the norms to measure.
        estimator: of their moments.
        ranks: the processes that measure together.
        waiting: keeps the runs that wait.
        pinned: norms that nobody waits at: they normalize by these statistics from the beginning, and are measured all
            the same. Those that are called several times in a forward pass.
        order: the order of the norms, as far as it is known.
        apart: whether no batch waits while another is on its way, so that a failure is the batch's own.
        copied: returns a copy of what the model reads of a batch, to be joined with others.

    Attributes:
        tallies: what each norm met; of all processes, once :meth:`finish` has returned.
        final: what the norms normalize by.
        late: norms that some batch came to after they had been made final.
        travellers: the batches.
        pinned: what nobody waits at, as given.
        failure: that of a batch in this process while others were on their way.
    """

    def __init__(
        self,
        start: Callable[[int, Any], ModelRun],
        sites: Sites,
        estimator: type[Estimator],
        ranks: Ranks,
        waiting: Waiting,
        pinned: Mapping[Site, Statistics],
        order: Sequence[Address],
        *,
        apart: bool,
        copied: Callable[[Any], Any],
    ) -> None:
        self.tallies: dict[Site, Tally] = {}
        self.final: dict[Site, Statistics] = {}
        self.late: set[Site] = set()
        self._start = start
        self._sites = sites
        self._estimator = estimator
        self._ranks = ranks
        self._waiting = waiting
        self._apart = apart
        self._copied = copied
        self._active: ModelRun | None = None
        self.failure: RunFailed | None = None
        self.pinned = pinned
        self._rank_of = {address: i for i, address in enumerate(order)}
        self.travellers: list[BatchInFlight] = []

    def begin(self, group: Group) -> None:
        """Send the next batches, joined, as far as they go."""
        traveller = BatchInFlight(group[0][0], len(group))
        if traveller.number > 1 and not self.joined:
            traveller.remember(_WITNESSES)
        self.travellers.append(traveller)
        if self.failure is None:
            self._set_out(traveller, joined(group))
            self._make_room()

    @property
    def batches(self) -> int:
        """How many batches were sent."""
        return sum(t.number for t in self.travellers)

    @property
    def joined(self) -> list[BatchInFlight]:
        """Those of more than one batch."""
        return [t for t in self.travellers if t.number > 1]

    def finish(self, inputs: ReplayableBatches, advance: Callable[[], None]) -> None:
        """Make one norm after another final, until every batch has left the model; in all processes together.

        Raises:
            Disturbed: the model failed on some batch, in some process, while others were on their way.
            RunFailed: it failed on a batch that was by itself.
        """
        while (site := self._next()) is not None:
            here = {site: self.tallies[site]} if site in self.tallies else {}
            merged = merge_tallies(self._ranks, self._sites, here)
            self.tallies.update(merged)
            self.final[site] = statistics_of(site, merged[site])
            advance()
            self._send_on(site, inputs)
        pinned = {site: self.tallies[site] for site in self.pinned if site in self.tallies}
        self.tallies.update(merge_tallies(self._ranks, self._sites, pinned))

    def close(self) -> None:
        """Leave the runs that wait, and the one that is on its way, if the sweep ended in the middle of it."""
        if self._active is not None:
            self._active.tell_to_leave()
        self._waiting.close()  # before it is waited for: one of these may hold a lock that it needs
        if self._active is not None:
            self._active.abandon()

    def lets_pass(self, site: Site) -> bool:
        """Return whether batches go through a norm without waiting."""
        return site in self.final or site in self.pinned

    def normalizes_by(self, site: Site) -> Statistics:
        """Return the statistics that a norm normalizes by in this sweep, once it does."""
        return self.pinned[site] if site in self.pinned else self.final[site]

    def met_pinned(self) -> list[Site]:
        """Return the pinned norms that were called."""
        return [site for site in self.pinned if site in self.tallies]

    def moves_of(self, site: Site) -> tuple[float, float]:
        """Return how far mean and variance of what a pinned norm met are from what it normalized by."""
        tally = self.tallies[site]
        return distances(self.pinned[site], statistics_of(site, tally), tally.eps)

    def keeping_pinned(self) -> Sweep:
        """Have the pinned norms hold what they normalized by, for that is what all others were measured with."""
        for site in self.met_pinned():
            self.tallies[site].stored = self.pinned[site]
        return self

    # -- which norm is next --------------------------------------------------------------------------------------------

    def _next(self) -> Site | None:
        """Return the norm that is made final now: the first in the order, else where most batches wait."""
        mine = Counter(t.at.address for t in self.travellers if t.at is not None)
        replies = self._ranks.agree((self.failure is not None, mine))
        if any(failed for failed, _ in replies):
            raise Disturbed from self.failure
        there: Counter[Address] = Counter()
        for _, counter in replies:
            there.update(counter)
        if not there:
            return None
        names = {site.address: i for i, site in enumerate(self._sites.known)}
        last = len(self._rank_of) + len(names)

        def urgency(address: Address) -> tuple[int, int, int, str]:
            return self._rank_of.get(address, last), -there[address], names.get(address, last), address[0]

        return self._sites.at(min(there, key=urgency))

    # -- the way of a batch --------------------------------------------------------------------------------------------

    def _send_on(self, site: Site, inputs: ReplayableBatches) -> None:
        here = [t for t in self.travellers if t.at is site]
        for traveller in here:
            if traveller.arrival is not None and self.failure is None:
                self._go_on(traveller)
        again = {t.index: t for t in here if t.at is site and self.failure is None}
        group: Group = []
        for index, batch in inputs.again([index for t in again.values() for index in t.indices]):
            if self.failure is not None:
                continue
            traveller = again[index if not group else group[0][0]]
            group.append((index, batch if traveller.number == 1 else self._copied(batch)))
            if len(group) == traveller.number:
                whole, group = joined(group), []
                self._set_out(traveller, whole)
                del whole

    def _set_out(self, traveller: BatchInFlight, batch: Any) -> None:
        run = self._begin_run(traveller.index, batch)
        del batch
        self._travel(traveller, run)

    def _make_room(self) -> None:
        """Let fewer wait in memory, the last first, if the batches that are held have grown into their place."""
        for traveller in reversed(self.travellers):
            if not self._waiting.too_much:
                return
            if traveller.run is not None and not self._waiting.shrink(traveller.run):
                traveller.run = traveller.arrival = None

    def _begin_run(self, index: int, batch: Any) -> ModelRun:
        while True:
            # known before its thread is: whatever interrupts us leaves it
            run = self._active = self._start(index, batch)
            try:
                run.start()
                return run
            except RuntimeError:  # the system allows no more threads
                run.abandon()
                waiting = [t for t in self.travellers if t.run is not None]
                if not waiting:
                    raise
                for traveller in waiting[len(waiting) // 2 :]:
                    assert traveller.run is not None
                    self._waiting.leave(traveller.run)
                    traveller.run = traveller.arrival = None
                self._waiting.most_runs = len(waiting) // 2

    def _go_on(self, traveller: BatchInFlight) -> None:
        run = self._active = traveller.run
        assert run is not None
        traveller.run = None
        self._waiting.wake(run)
        self._travel(traveller, run)

    def _travel(self, traveller: BatchInFlight, run: ModelRun) -> None:
        """Let a run go on until it has to wait; a failure is set aside where it may be the fault of other batches."""
        traveller.at = None
        try:
            with below_autograd():
                arrival = self._to_next_wait(traveller, run)
        except Stuck as error:  # it is left once those who wait are
            self.failure = RunFailed(traveller, error)
            return
        except Exception as error:
            run.abandon()
            failure = RunFailed(traveller, error)
            if self._apart or len(self.travellers) == 1:
                raise failure from error
            self.failure = failure
            return
        if arrival is not None:
            traveller.at = arrival.site
            if self._waiting.keep(run):
                traveller.run, traveller.arrival = run, arrival
        self._active = None

    def _to_next_wait(self, traveller: BatchInFlight, run: ModelRun) -> Arrival | None:
        arrival, traveller.arrival = traveller.arrival, None
        answer = None if arrival is None else self._pass(run, arrival)
        patience = _PATIENCE if self._waiting else None
        while (arrival := run.go(answer, patience)) is not None:
            _require_joinable(traveller, run)
            self._count(traveller, arrival)
            if not self.lets_pass(arrival.site):
                return arrival
            answer = self._pass(run, arrival)
        _require_joinable(traveller, run)
        return None

    def _count(self, traveller: BatchInFlight, arrival: Arrival) -> None:
        """Add what the batch brings to the norm's tally, unless it did so in an earlier run."""
        site, call = arrival.site, arrival.call
        if arrival.visit <= traveller.counted[site]:
            return
        self._waiting.require(call.given)
        if traveller.number > 1:
            self._count_joined(traveller, arrival)
        else:
            self._count_one(traveller, arrival)
        traveller.counted[site] += 1
        traveller.way.append(site)
        if site in self.final and site not in self.pinned:
            self.late.add(site)

    def _count_one(self, traveller: BatchInFlight, arrival: Arrival) -> None:
        site, call = arrival.site, arrival.call
        met = moments_of(call.input, call.mask)
        require_channels(site, met)
        require_finite(site.name, met)
        tally = self._tally(site, met.num_features, call)
        fewest, most = counts_of(call.input, met, call.mask)
        tally.add(met, traveller.index, first=arrival.visit == 1, fewest=fewest, most=most)
        for brought in traveller.brought.values():
            brought.append(met)

    def _count_joined(self, traveller: BatchInFlight, arrival: Arrival) -> None:
        site, call = arrival.site, arrival.call
        if call.mask is not None or len(call.input) % traveller.number or not call.input.numel():
            raise Unjoinable
        parts = Parts.of(call.input, traveller.number)
        met = parts.together()
        require_channels(site, met)
        require_finite(site.name, met)
        tally = self._tally(site, met.num_features, call)
        tally.add_parts(parts, traveller.index, first=arrival.visit == 1)
        for index, brought in traveller.brought.items():
            brought.append(parts.one(index - traveller.index))

    def _tally(self, site: Site, channels: int, call: NormCall) -> Tally:
        tally = self.tallies.get(site)
        if tally is None:
            tally = self.tallies[site] = Tally(self._estimator(channels, call.input.device), call.eps)
        return tally

    def _pass(self, run: ModelRun, arrival: Arrival) -> Tensor:
        self._waiting.require(arrival.call.given)
        answer: Tensor = arrival.call.run_on(*self.normalizes_by(arrival.site))
        run.storages.note(answer)
        return answer


def _require_joinable(traveller: BatchInFlight, run: ModelRun) -> None:
    """Refuse joined batches whose way through the model may depend on their values.

    Raises:
        Unjoinable: it may.
    """
    if traveller.number > 1 and run.looks_at_values:
        raise Unjoinable
