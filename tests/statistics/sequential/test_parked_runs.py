"""Which runs keep their memory: as many as fit; others go to the shelf, or are left."""

from __future__ import annotations

from typing import Any

import pytest

from batchnorm.statistics.sequential.parked_runs import MOST_RUNS, Waiting


class Run:
    """A run that takes so many bytes, and tells what is done to it."""

    def __init__(self, nbytes: int) -> None:
        self.size, self.left = nbytes, False
        self.storages = self

    def nbytes(self) -> int:
        return self.size

    def abandon(self) -> None:
        self.left = True


class Shelf:
    def __init__(self) -> None:
        self.held: list[Run] = []
        self.asked: list[Any] = []

    def put(self, run: Run) -> None:
        self.held.append(run)

    def bring(self, run: Run) -> None:
        if run in self.held:
            self.held.remove(run)

    drop = bring

    def require(self, arguments: Any) -> None:
        self.asked.append(arguments)


class Limits:
    """How much room there is, which a test changes under way."""

    def __init__(self, room: float) -> None:
        self.room, self.fits = room, True


def waiting(limits: Limits, shelf: Shelf | None = None, **options: Any) -> Waiting:
    return Waiting(lambda: limits.room, lambda: limits.fits, shelf, **options)  # type: ignore[arg-type]


def test_what_fits_waits_and_what_does_not_is_left() -> None:
    limits = Limits(100)
    runs, kept = [Run(60), Run(40), Run(1), Run(0)], waiting(limits)
    assert [kept.keep(run) for run in runs] == [True, True, False, True]
    assert [run.left for run in runs] == [False, False, True, False]
    assert len(kept) == 3
    kept.wake(runs[0])
    assert not runs[0].left
    assert kept.keep(Run(60))  # in its place
    limits.fits = False  # the process as a whole is too large
    assert not kept.keep(Run(0))


def test_what_does_not_fit_goes_to_the_shelf_and_comes_back() -> None:
    shelf = Shelf()
    kept = waiting(Limits(100), shelf)
    first, second = Run(80), Run(30)
    assert kept.keep(first)
    assert kept.keep(second)
    assert shelf.held == [second]
    assert len(kept) == 2
    kept.wake(second)
    assert shelf.held == []
    assert kept.keep(Run(20))  # those on the shelf take no room, before or after
    kept.require("arguments")
    assert shelf.asked == ["arguments"]


def test_where_something_else_grows_room_is_made() -> None:
    for shelf in (None, Shelf()):
        limits = Limits(100)
        kept, run, other = waiting(limits, shelf), Run(60), Run(30)
        assert not kept.too_much  # nothing waits
        assert kept.keep(run)
        assert kept.keep(other)
        assert not kept.too_much
        limits.room = 50
        assert kept.too_much
        assert kept.shrink(run) is (shelf is not None)
        assert run.left is (shelf is None)
        assert not kept.too_much
        if shelf is not None:
            assert kept.shrink(run)  # which is there already
            assert shelf.held == [run]
        limits.fits = False
        assert kept.too_much


def test_no_more_threads_wait_than_the_system_allows_and_none_apart() -> None:
    kept = waiting(Limits(1e9), Shelf())
    kept.most_runs = 2
    assert [kept.keep(Run(1)) for _ in range(3)] == [True, True, False]
    assert waiting(Limits(1e9)).most_runs == MOST_RUNS
    alone, run = waiting(Limits(1e9), Shelf(), apart=True), Run(1)
    assert not alone.keep(run)
    assert run.left


def test_at_the_end_all_are_left() -> None:
    shelf = Shelf()
    kept, runs = waiting(Limits(50), shelf), [Run(40), Run(40)]
    for run in runs:
        kept.keep(run)
    kept.close()
    assert all(run.left for run in runs)
    assert (len(kept), shelf.held) == (0, [])


def test_an_interrupt_while_a_run_is_left_leaves_it_to_the_next_attempt() -> None:
    kept, run = waiting(Limits(50)), Run(10)
    kept.keep(run)
    run.abandon = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        kept.close()
    assert len(kept) == 1
