"""The process's random generators are as they were, whoever else draws meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.interrupts import Interrupting
from torch import nn

from batchnorm.models.random_state import generators_kept
from batchnorm.models.snapshot import untouched
from batchnorm.models.transaction import transaction

LONG = 60.0


def test_what_a_body_draws_is_drawn_again_behind_it() -> None:
    before = torch.get_rng_state()
    with generators_kept():
        drawn = torch.rand(3)
        with generators_kept():
            inner = torch.rand(3)
        assert torch.equal(torch.rand(3), inner)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.rand(3), drawn)


def test_an_error_changes_nothing_of_that() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), generators_kept():  # noqa: PT012
        torch.manual_seed(3)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), before)


def test_overlapping_uses_of_two_threads_leave_what_the_first_one_met() -> None:
    """The second one enters while the first has drawn, and leaves after it."""
    before = torch.get_rng_state()
    entered, first_is_out = threading.Event(), threading.Event()

    def second() -> None:
        with untouched(nn.Identity()):
            entered.set()
            assert first_is_out.wait(LONG)

    thread = threading.Thread(target=second)
    with untouched(nn.Identity()):
        torch.manual_seed(5)
        thread.start()
        assert entered.wait(LONG)
    first_is_out.set()
    thread.join(LONG)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_thread_that_has_ended_inside_counts_no_more() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(LONG)
    generators_kept._depths[thread] = 1  # an interrupt met the line that takes it out
    for seed in (7, 8):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with generators_kept():
            torch.rand(1)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_anywhere_a_verb_leaves_the_generators_as_they_were() -> None:
    @transaction("test")
    def seeds(model: nn.Module) -> None:
        with untouched(model):
            torch.manual_seed(3)

    before = torch.get_rng_state()
    for n in range(1, 10_000):
        try:
            Interrupting(n).run(lambda: seeds(nn.Identity()))
        except KeyboardInterrupt:
            assert torch.equal(torch.get_rng_state(), before), f"interrupted at {n}"
            assert not generators_kept._is_used(), f"interrupted at {n}"
        else:
            break
    assert n > 10
