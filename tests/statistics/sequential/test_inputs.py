"""The batches are the same whenever they are needed again, or it is said that they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.statistics.sequential.networks import assert_alike, expected, images, network
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.errors import StateError
from batchnorm.statistics import recalibrate


class OneBuffer:
    """Gives every batch in the same memory, written by numpy, as fast loaders do."""

    def __iter__(self) -> Any:
        memory = np.empty((4, 3, 8, 8), np.float32)
        batch = torch.from_numpy(memory)
        for values in images(4, 4, 4, 4):
            memory[...] = values.numpy()
            yield batch


def test_batches_in_one_memory_are_refused_while_they_are_held() -> None:
    with pytest.raises(StateError, match=r"every batch in the same memory.*yield batch\.clone"):
        recalibrate(network(), OneBuffer())


def test_batches_in_one_memory_are_measured_if_they_are_taken_from_the_stream_again() -> None:
    model = network()
    recalibrate(model, OneBuffer(), memory=0)
    assert_alike(model, expected(network(), images(4, 4, 4, 4)))


def test_batches_of_conjugated_numbers_are_taken() -> None:
    model, batches = network(), images(4, 4)
    numbers = [torch.complex(batch, -batch).conj() for batch in batches]
    recalibrate(model, numbers, forward=lambda m, x: m(x.imag))
    assert_alike(model, expected(network(), batches))


@pytest.mark.parametrize("tolerance", [None, 1e-4])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_loader_with_workers_may_be_walked_again_before_it_has_ended(persistent: bool, tolerance: Any) -> None:
    batches = images(*[2] * 20)
    dataset = TensorDataset(torch.cat(batches))
    loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=persistent)
    model = network()
    recalibrate(model, loader, memory=4000, tolerance=tolerance)
    assert int(model[1].num_batches_tracked) == 20
    assert_alike(model, expected(network(), batches))
