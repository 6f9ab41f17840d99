"""Wrong arguments of a block are refused in the call, though nobody enters it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from batchnorm.blocks import block, undone
from batchnorm.errors import ShapeError

EVENTS: list[str] = []


def positive(x: int, *, why: str = "") -> None:
    """Refuse what is not positive."""
    EVENTS.append("checked")
    if x <= 0:
        raise ShapeError(f"within: x={x}: expected a positive number{why}.")


@block(positive)
def within(x: int, *, why: str = "") -> Iterator[None]:
    """Be within x."""
    EVENTS.append("entered")
    try:
        yield
    finally:
        EVENTS.append("left")


@pytest.fixture(autouse=True)
def events() -> list[str]:
    EVENTS.clear()
    return EVENTS


def test_arguments_are_checked_in_the_call_and_nothing_else_happens_there(events: list[str]) -> None:
    with pytest.raises(ShapeError, match=r"^within: x=0: expected a positive number, always\.$"):
        within(0, why=", always")
    within(1)
    assert events == ["checked", "checked"]


def test_the_body_runs_between_entering_and_leaving_and_is_left_by_an_exception(events: list[str]) -> None:
    def fail() -> None:
        with within(1):
            events.append("inside")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert events == ["checked", "entered", "inside", "left"]


def test_each_call_is_a_block_of_its_own() -> None:
    with within(1), within(2):
        EVENTS.append("inside")
    assert EVENTS == ["checked", "entered", "checked", "entered", "inside", "left", "left"]


def test_it_is_documented_as_the_generator_was_and_decorates_functions_too() -> None:
    assert (within.__name__, within.__doc__) == ("within", "Be within x.")
    assert list(inspect.signature(within).parameters) == ["x", "why"]

    @within(1)
    def work() -> int:
        return 7

    EVENTS.clear()
    assert work() == 7
    assert EVENTS == ["entered", "left"]


def test_an_undo_is_called_again_where_an_interrupt_meets_it(events: list[str]) -> None:
    def undo() -> None:
        events.append("undo")
        if events.count("undo") == 1:
            raise KeyboardInterrupt

    @contextmanager
    def changed() -> Iterator[None]:
        yield from undone(lambda: events.append("change"), undo)

    with pytest.raises(KeyboardInterrupt), changed():
        events.append("inside")
    assert events == ["change", "inside", "undo", "undo"]


def test_half_a_change_is_undone(events: list[str]) -> None:
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        next(undone(fail, lambda: events.append("undo")))
    assert events == ["undo"]
