"""The metric of each batch: of its own outputs, of those of other samples, of wanted ones and of zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm.diagnosis.readings import Reader, Reading
from batchnorm.errors import ArgumentTypeError, BatchError


def off(output: Tensor, batch: Any) -> Tensor:
    return (output - batch[1]).abs().mean()


def right(output: Tensor, batch: Any) -> float:
    return float((output.argmax(1) == batch[1]).double().mean())


def read(metric: Any, *pairs: tuple[Any, Any]) -> list[Reading]:
    reader = Reader(metric)
    for index, (output, batch) in enumerate(pairs):
        reader.take(output, batch, index)
    return reader.readings


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1)


def test_values_are_compared_with_those_of_other_samples_with_wanted_ones_and_with_zeros() -> None:
    (reading,) = read(off, (column(1, 2, 4), (torch.zeros(3, 7), column(1, 2, 3))))
    # |1−1|, |2−2|, |4−3|; turned: |4−1|, |2−2|, |1−3|; the batch with the outputs for its values: no error at all
    assert reading == Reading(3, pytest.approx(1 / 3), pytest.approx(5 / 3), pytest.approx(5 / 3), 0.0, 2.0)


def test_classes_are_those_of_the_largest_output() -> None:
    logits = torch.eye(3)[[0, 1, 1, 2]]
    (reading,) = read(right, (logits, (torch.zeros(4, 7), torch.tensor([0, 1, 2, 2]))))
    assert (reading.value, reading.turned, reading.ideal, reading.zeros) == (0.75, 0.25, 1.0, 0.25)


def test_later_batches_are_compared_with_the_outputs_of_the_first_where_these_are_enough() -> None:
    first, second, third = column(1, 2, 3), column(5, 6), column(1, 2, 3, 4)
    data = [(y, (torch.zeros(len(y), 7), y)) for y in (first, second, third)]
    readings = read(off, *data)
    assert [reading.value for reading in readings] == [0.0] * 3
    assert readings[0].other == readings[0].turned
    assert readings[1].other == ((5 - 3) + (6 - 2)) / 2  # 3 and 2, the last two of the first in reverse
    assert readings[2].other == readings[2].turned == 2.0  # four are more than three
    assert [reading.samples for reading in readings] == [3, 2, 4]


def test_the_mean_weighs_samples() -> None:
    reader = Reader(off)
    reader.take(column(1, 1, 1), (torch.zeros(3, 7), column(0, 0, 0)), 0)
    reader.take(column(5), (torch.zeros(1, 7), column(0)), 1)
    assert reader.mean == (3 * 1 + 1 * 5) / 4
    assert Reader(off).mean == 0.0


@pytest.mark.parametrize(
    ("output", "batch", "known"),
    [
        (column(1, 2), (torch.zeros(2, 7), column(1, 2)), True),
        (column(1, 2), (torch.zeros(2, 7), torch.tensor([1.0, 2.0])), True),  # but for axes of one
        (column(1, 2), (torch.zeros(2, 7), torch.tensor([1, 0])), False),  # one output has no classes
        (torch.eye(2), (torch.zeros(2, 7), torch.tensor([1, 0])), True),
        (torch.zeros(2, 3, 4, 4), (torch.zeros(2, 7), torch.zeros(2, 4, 4).long()), True),  # a class for each position
        (column(1, 2), torch.zeros(2, 7), False),  # the input alone
        (torch.tensor(1.0), (torch.zeros(2, 7), column(1, 2)), False),  # no output of a sample
        ({"y": column(1, 2)}, {"x": torch.zeros(2, 7), "y": column(1, 2)}, True),
    ],
)
def test_where_somebody_knows_what_is_wanted(output: Any, batch: Any, known: bool) -> None:
    (reading,) = read(lambda output, batch: 0.5, (output, batch))
    assert (reading.ideal is not None, reading.zeros is not None) == (known, known)


def test_yes_and_no_are_wanted_where_the_output_is_positive() -> None:
    seen: list[Any] = []
    read(lambda output, batch: seen.append(batch[1]) or 0.0, (column(-1, 2), (torch.zeros(2, 7), column(1, 1).long())))
    assert [0, 1] in [target.flatten().tolist() for target in seen]


def test_a_metric_that_takes_only_the_models_own_outputs_is_taken_once() -> None:
    own = column(1, 2, 3)

    def picky(output: Tensor, batch: Any) -> float:
        assert output is own
        assert batch[1].sum() == 7
        return 0.5

    (reading,) = read(picky, (own, (torch.zeros(3, 7), column(1, 1, 5))))
    assert reading == Reading(3, 0.5, None, None, None, None)


@pytest.mark.parametrize("number", [1, 0.5, torch.tensor(0.5), torch.tensor([[2.0]]), True])
def test_numbers(number: Any) -> None:
    assert read(lambda output, batch: number, (column(1), column(1)))[0].value == float(number)


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), ("0.5", "str"), (torch.zeros(2, 1), r"a tensor of shape \(2, 1\)")]
)
def test_other_values_are_told(value: Any, kind: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"one number, the mean over the batch; got {kind} on batch 0"):
        read(lambda output, batch: value, (column(1), column(1)))


def test_a_metric_that_fails_is_told_with_the_batch() -> None:
    def fails(output: Tensor, batch: Any) -> float:
        if len(output) == 2:
            raise KeyError("labels")
        return 0.0

    with pytest.raises(BatchError, match=r"loss_or_metric failed on batch 1 \(counting from 0\): KeyError: 'labels'"):
        read(fails, (column(1), column(1)), (column(1, 2), column(1, 2)))


def test_the_metric_runs_without_gradients() -> None:
    (reading,) = read(lambda output, batch: float(torch.is_grad_enabled()), (column(1), column(1)))
    assert reading.value == 0.0
