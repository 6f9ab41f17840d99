"""The batches are the same whenever they are needed again, or it is said that they are not."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from tests.statistics.sequential.networks import assert_alike, expected, images, network
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.errors import StateError
from batchnorm.statistics import recalibrate
from batchnorm.statistics.sequential import replayable_batches as inputs


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


@pytest.mark.parametrize("memory", [None, 60_000])
def test_a_long_stream_in_one_memory_is_refused_whether_it_fits_or_not(memory: Any) -> None:
    def stream() -> Any:
        batch = torch.empty(2, 3, 8, 8)
        for values in images(*[2] * 60):
            yield batch.copy_(values)

    class Loader:
        def __iter__(self) -> Any:
            return stream()

    with pytest.raises(StateError, match=r"every batch in the same memory.*yield batch\.clone"):
        recalibrate(network(), Loader(), memory=memory)


@pytest.mark.parametrize("kind", ["new", "one", "views", "restarts"])
def test_a_stream_without_end_meets_the_limit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it yields: new tensors, one tensor again and again, parts of one, or a loader that can start again."""
    monkeypatch.setattr(inputs, "_MOST_UNHELD", 300)
    one = images(200)[0]

    def stream() -> Any:
        for i in count():
            yield {"new": one[:2].clone, "views": lambda i=i: one[i % 100 : i % 100 + 2]}.get(kind, lambda: one[:2])()

    class Loader:
        def __iter__(self) -> Any:
            return stream()

    said = "tells no length.*may be endless" if kind == "restarts" else "walked through only once.*islice"
    with pytest.raises(StateError, match=said):
        recalibrate(network(), Loader() if kind == "restarts" else stream(), memory=300_000)


def test_batches_in_one_memory_are_measured_if_they_are_taken_from_the_stream_again() -> None:
    model = network()
    recalibrate(model, OneBuffer(), memory=0)
    assert_alike(model, expected(network(), images(4, 4, 4, 4)))


def test_batches_of_conjugated_numbers_are_taken() -> None:
    model, batches = network(), images(4, 4)
    numbers = [torch.complex(batch, -batch).conj() for batch in batches]
    recalibrate(model, numbers, forward=lambda m, x: m(x.imag))
    assert_alike(model, expected(network(), batches))


@pytest.mark.every(2)
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
