"""Which batches are kept, and how they are cut."""

from __future__ import annotations

import pytest
import torch

from batchnorm.diagnosis.kept_batches import MOST_BATCHES, batch_size, float_inputs, hold, rows, split, with_input


@pytest.mark.parametrize(("size", "taken"), [(64, MOST_BATCHES), (8, 128), (1, 1024)])
def test_of_a_long_stream_32_batches_or_1024_samples_are_taken(size: int, taken: int) -> None:
    walked = 0

    def stream():
        nonlocal walked
        for _ in range(5000):
            walked += 1
            yield torch.zeros(size, 3)

    assert len(hold(stream())) == taken
    assert walked == taken  # the rest is not even asked for


def test_rows_of_a_batch_are_those_of_all_its_tensors() -> None:
    batch = {"x": torch.arange(8.0).view(4, 2), "y": torch.arange(4), "scale": torch.tensor(2.0), "name": "a"}
    assert batch_size(batch) == 4
    some = rows(batch, torch.tensor([3, 0]))
    assert some["x"].tolist() == [[6, 7], [0, 1]]
    assert some["y"].tolist() == [3, 0]
    assert (some["scale"], some["name"]) == (batch["scale"], "a")


def test_a_smaller_rest_is_left_out_of_the_pieces() -> None:
    assert [piece.tolist() for piece in split(torch.arange(5), 2)] == [[0, 1], [2, 3]]


def test_only_the_first_tensor_is_the_input() -> None:
    batch = (torch.ones(2, 3), torch.ones(2))
    changed = with_input(batch, lambda x: 2 * x)
    assert float(changed[0].sum()) == 12
    assert changed[1] is batch[1]
    assert float_inputs(batch)
    assert not float_inputs((torch.ones(2, dtype=torch.int64), torch.ones(2, 3)))
