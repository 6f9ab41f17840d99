"""All batches side by side, from norm to norm: which norm is next, who waits, who is run again, and who failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.ranks import Alone
from batchnorm.statistics.sequential.parked_runs import Waiting
from batchnorm.statistics.sequential.run import Arrival
from batchnorm.statistics.sequential.sweep import BatchInFlight, Disturbed, RunFailed, Sweep, Unjoinable
from batchnorm.statistics.sites import Site, Sites


class Run:
    """A batch that goes through norms by name, as a script says; what it is given back is noted."""

    def __init__(self, model: nn.ModuleDict, sites: Sites, batch: Tensor, way: list[Any]) -> None:
        self.model, self.sites, self.x, self.left = model, sites, batch, list(way)
        self.storages = SimpleNamespace(note=lambda output: None, nbytes=lambda: 1)
        self.looks_at_values = self.abandoned = False
        self.visits: dict[str, int] = {}

    def start(self) -> None:
        pass

    def go(self, answer: Tensor | None, patience: float | None) -> Arrival | None:
        if answer is not None:
            self.x = answer
        if not self.left:
            return None
        name = self.left.pop(0)
        if isinstance(name, Exception):
            raise name
        self.visits[name] = self.visits.get(name, 0) + 1
        norm = self.model[name]
        arguments = (self.x, None, None, norm.running_mean, norm.running_var, True, 0.1, 1e-5, False)
        call = NormCall.of(torch.ops.aten.batch_norm.default, arguments, {})
        assert call is not None
        site = next(site for site in self.sites.known if site.name == name)
        return Arrival(site, call, self.visits[name])

    def abandon(self) -> None:
        self.abandoned = True

    def tell_to_leave(self) -> None:
        self.abandoned = True


class Bench:
    """A sweep over norms a, b and c, in which each batch takes a way that the test chooses."""

    def __init__(self, *ways: list[Any], room: float = 1e9, apart: bool = False, order: str = "") -> None:
        self.model = nn.ModuleDict({name: nn.BatchNorm1d(2, affine=False) for name in "abc"}).double()
        self.sites = Sites(self.model, None)
        self.ways, self.runs = ways, list[Run]()
        self.batches = list(torch.randn(len(ways), 4, 2, generator=torch.Generator().manual_seed(0)).double() * 3 + 1)
        waiting = Waiting(lambda: room, lambda: True, None, apart=apart)
        by_name = {site.name: site for site in self.sites.known}
        self.site: Callable[[str], Site] = by_name.__getitem__
        self.sweep = Sweep(
            *(self._start, self.sites, Pooled, Alone(), waiting, {}),
            [by_name[name].address for name in order],
            apart=apart,
            copied=lambda batch: batch,
        )
        self.finals: list[str] = []

    def _start(self, index: int, batch: Any) -> Any:
        self.runs.append(Run(self.model, self.sites, batch, self.ways[index]))
        return self.runs[-1]

    def again(self, indices: list[int]) -> Iterator[tuple[int, Tensor]]:
        return ((index, self.batches[index]) for index in indices)

    def run(self) -> Bench:
        for index, batch in enumerate(self.batches):
            self.sweep.begin([(index, batch)])
        self.sweep.finish(self, lambda: self.finals.append(list(self.sweep.final)[-1].name))  # type: ignore[arg-type]
        return self

    def mean(self, name: str) -> Tensor:
        return self.sweep.tallies[self.site(name)].estimator.pooled.mean


def test_a_norm_is_made_final_when_all_have_met_it_and_those_behind_meet_its_output() -> None:
    bench = Bench(["a", "b"], ["a", "b"], ["a", "b"]).run()
    x = torch.cat(bench.batches)
    assert bench.finals == ["a", "b"]
    torch.testing.assert_close(bench.mean("a"), x.mean(0))
    normalized = (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()
    torch.testing.assert_close(bench.mean("b"), normalized.mean(0), atol=1e-12, rtol=0)
    assert len(bench.runs) == 3  # each batch ran once
    assert bench.sweep.batches == 3
    assert bench.sweep.late == set()


def test_without_room_batches_start_again_and_count_once() -> None:
    roomy, tight = Bench(["a", "b"], ["a", "b"]).run(), Bench(["a", "b"], ["a", "b"], room=0.0).run()
    assert len(tight.runs) == 2 + 2 + 2  # to a, then to b, then to the end
    for name in "ab":
        assert torch.equal(tight.mean(name), roomy.mean(name))
        assert tight.sweep.tallies[tight.site(name)].calls == 2


@pytest.mark.parametrize(("order", "finals"), [("", ["a", "b", "c"]), ("cab", ["c", "a", "b"])])
def test_the_order_that_is_known_decides_else_where_most_wait(order: str, finals: list[str]) -> None:
    assert Bench(["a"], ["a"], ["b"], ["b"], ["c"], order=order).run().finals == finals


def test_a_norm_that_somebody_comes_to_after_it_was_final_is_late() -> None:
    bench = Bench(["a"], ["a"], ["b", "a"]).run()
    assert bench.finals == ["a", "b"]
    assert {site.name for site in bench.sweep.late} == {"a"}
    assert bench.sweep.tallies[bench.site("a")].batches == 3


def test_pinned_norms_let_everybody_pass_and_are_measured_all_the_same() -> None:
    bench = Bench(["a", "a", "b"], ["a", "a", "b"])
    pinned = (torch.ones(2).double(), torch.full((2,), 4.0).double())
    bench.sweep.pinned = {bench.site("a"): pinned}
    bench.run()
    assert bench.finals == ["b"]
    tally = bench.sweep.tallies[bench.site("a")]
    assert (tally.batches, tally.calls, tally.stored) == (2, 4, None)
    assert bench.sweep.met_pinned() == [bench.site("a")]
    assert min(bench.sweep.moves_of(bench.site("a"))) > 0
    assert bench.sweep.keeping_pinned().tallies[bench.site("a")].stored is pinned
    assert bench.sweep.normalizes_by(bench.site("a")) is pinned


def test_a_failure_among_others_is_set_aside_until_the_next_norm() -> None:
    error = ValueError("in the middle")
    bench = Bench(["a"], ["a", error], ["a"])
    with pytest.raises(Disturbed) as caught:
        bench.run()
    failure = caught.value.__cause__
    assert isinstance(failure, RunFailed)
    assert (failure.index, failure.joined, failure.error) == (1, False, error)
    assert bench.runs[1].abandoned
    bench.sweep.close()
    assert all(run.abandoned for run in bench.runs[1:])


@pytest.mark.parametrize("apart", [True, False])
def test_a_failure_of_a_batch_by_itself_is_its_own(apart: bool) -> None:
    error = ValueError("at once")
    bench = Bench(["a", error], *([["a"]] * apart), apart=apart)
    with pytest.raises(RunFailed) as caught:
        bench.run()
    assert (caught.value.index, caught.value.error) == (0, error)


def test_values_that_are_not_finite_are_a_failure_of_the_batch() -> None:
    bench = Bench(["a"])
    bench.batches[0][1, 1] = torch.nan
    with pytest.raises(RunFailed) as caught:
        bench.run()
    assert "a met NaN or infinity in 1 of its 2 channels" in str(caught.value.error)


def test_batches_that_are_joined_are_counted_one_by_one() -> None:
    bench = Bench(["a"])
    bench.batches = list(torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1)).double())
    bench.sweep.begin(list(enumerate(bench.batches)))
    bench.sweep.finish(bench, lambda: None)  # type: ignore[arg-type]
    tally = bench.sweep.tallies[bench.site("a")]
    assert (tally.batches, tally.calls, bench.sweep.batches) == (3, 3, 3)
    torch.testing.assert_close(bench.mean("a"), torch.cat(bench.batches).mean(0))
    (traveller,) = bench.sweep.joined
    for index, (met,) in traveller.brought.items():  # the witnesses, each as it is alone
        torch.testing.assert_close(met.mean, bench.batches[index].mean(0))
    assert set(traveller.brought) == {0, 1, 2}


def test_a_group_that_cannot_be_told_apart_is_refused() -> None:
    bench = Bench(["a"])
    bench.sweep._start = lambda index, batch: Run(bench.model, bench.sites, batch[1:], ["a"])  # type: ignore[assignment]
    with pytest.raises(RunFailed) as caught:
        bench.sweep.begin([(0, torch.randn(4, 2).double()), (1, torch.randn(4, 2).double())])
    assert isinstance(caught.value.error, Unjoinable)
    assert caught.value.joined


@pytest.mark.parametrize(
    ("index", "number", "remembered"),
    [(0, 1, {0}), (3, 1, set()), (0, 4, {0}), (5, 4, {6}), (8, 4, {8})],
)
def test_one_batch_of_each_group_is_remembered_in_another_place(index: int, number: int, remembered: set[int]) -> None:
    assert set(BatchInFlight(index, number).brought) == remembered
    assert BatchInFlight(index, number).indices == range(index, index + number)
    many = BatchInFlight(index, 16)
    many.remember(8)
    assert len(set(many.brought)) >= 8
    assert set(many.brought) <= set(many.indices)
