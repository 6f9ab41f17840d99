"""Streams of batches: what is taken, what is refused, and what a failing loader says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from batchnorm.errors import ArgumentTypeError, BatchError, EmptyStreamError
from batchnorm.statistics.stream import in_one_line, length_of, numbered, part_of, require_stream


class Unsized(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (torch.zeros(8, 3), r"one tensor of shape \(8, 3\).*\[batch\]"),
        ({"x": torch.zeros(8, 3)}, r"one dict.*\[batch\]"),
        (3, "such as a DataLoader.*got int"),
        ("data", "got str"),
        (None, "got NoneType"),
        (torch.nn.Sequential(), "got Sequential"),
    ],
)
def test_what_is_no_stream_is_refused(batches: Any, words: str) -> None:
    with pytest.raises(ArgumentTypeError, match=words):
        require_stream("recalibrate", batches)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_parts_make_up_the_stream_at_every_walk(size: int) -> None:
    parts = [part_of(range(7), first=rank, every=size) for rank in range(size)]
    for _ in range(2):
        assert sorted(batch for part in parts for batch in part) == list(range(7))
    assert list(part_of(range(7), first=1, every=2, most=2)) == [1, 3]


def test_a_part_can_be_walked_through_as_often_as_the_stream() -> None:
    batches = [7, 8]
    assert part_of(batches) is batches
    once = part_of(iter(batches), most=1)
    assert iter(once) is once
    assert list(once) == [7]


def test_batches_are_numbered_from_zero() -> None:
    require_stream("recalibrate", [7, 8])
    assert list(numbered("recalibrate", [7, 8])) == [(0, 7), (1, 8)]


def test_a_sequence_without_iter_is_walked_through() -> None:
    class Old:
        def __getitem__(self, index: int) -> int:
            return [5, 6][index]

    require_stream("recalibrate", Old())
    assert list(numbered("recalibrate", Old())) == [(0, 5), (1, 6)]


def test_lengths() -> None:
    assert length_of([1, 2]) == 2
    assert length_of(x for x in [1]) is None
    assert length_of(DataLoader(Unsized())) is None


def test_an_empty_or_spent_stream_says_so() -> None:
    spent = iter([1])
    list(spent)
    for batches in ([], spent):
        with pytest.raises(EmptyStreamError, match=r"at least one batch.*walked through only once"):
            list(numbered("recalibrate", batches))


def test_a_failing_loader_is_named_with_its_batch_and_cause() -> None:
    def loader() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk gone")

    seen = []
    with pytest.raises(BatchError, match=r"loader failed to give batch 2 .*OSError: disk gone") as caught:
        seen.extend(numbered("recalibrate", loader()))
    assert isinstance(caught.value.__cause__, OSError)


def test_a_loader_that_fails_to_start_is_named_too() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise RuntimeError("no workers")

    with pytest.raises(BatchError, match=r"batch 0 .*no workers"):
        list(numbered("recalibrate", Broken()))


def test_an_interrupt_is_not_a_failure_of_the_loader() -> None:
    def loader() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(numbered("recalibrate", loader()))


def test_errors_in_one_line() -> None:
    assert in_one_line(ValueError()) == "ValueError."
    assert in_one_line(ValueError("bad.\nworse")) == "ValueError: bad."
