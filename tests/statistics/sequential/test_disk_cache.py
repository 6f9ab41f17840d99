"""What is put aside on disk comes back, whoever asks for it and however the run ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.statistics.sequential.networks import assert_alike, expected, images, network
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.errors import BatchError
from batchnorm.statistics import recalibrate
from batchnorm.statistics.sequential.disk_cache import DiskCache


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_parameter_that_another_batch_computed_is_there_for_the_norm(tmp_path: Path) -> None:
    model, batches = network(), images(4, 4, 4, 4)
    parametrize.register_parametrization(model[1], "weight", Doubled())
    twin = expected(model, batches)
    with parametrize.cached():
        recalibrate(model, batches, memory=0, cache=tmp_path)
    assert_alike(model, twin)


class Sample:
    """A batch whose tensors nobody finds but its model."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_the_users_own_tensors_have_their_memory_after_a_failure(tmp_path: Path) -> None:
    model, batches = network(), [Sample(x) for x in images(4, 4, 4, 2)]
    before = [batch.x.clone() for batch in batches]

    def forward(m: nn.Module, batch: Sample) -> Any:
        batch.x.mul_(1)  # in place: its memory then counts as the run's
        if len(batch.x) == 2:
            raise ValueError("too small")
        return m(batch.x)

    with pytest.raises(BatchError, match="too small"):
        recalibrate(model, batches, forward=forward, memory=0, cache=tmp_path)
    assert all(torch.equal(batch.x, x) for batch, x in zip(batches, before, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_somebody_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = DiskCache.put

    def put_and_lose(self: DiskCache, run: Any) -> None:
        put(self, run)
        self._files[run].unlink()

    monkeypatch.setattr(DiskCache, "put", put_and_lose)
    with pytest.raises(BatchError, match=r"cache=.*No such file.*The model is as it was"):
        recalibrate(network(), images(4, 4, 4), memory=0, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_is_named_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(BatchError) as caught:
        recalibrate(network(), images(4), cache=tmp_path / "missing")
    assert f"cache={str(tmp_path / 'missing')!r}: No such file or directory" in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, None], ids=["already interrupted", "at the end"])
def test_an_interrupt_while_the_folder_is_removed_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    remove, calls = shutil.rmtree, []

    def interrupted(folder: Path, **options: Any) -> None:
        calls.append(folder)
        if len(calls) < 3:
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), DiskCache(tmp_path) as cache:  # noqa: PT012
        assert cache is not None
        if error is not None:
            raise error
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_runs_are_dropped_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: DiskCache, run: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DiskCache, "drop", interrupted)
    with pytest.raises(KeyboardInterrupt), DiskCache(tmp_path) as cache:
        cache._away[None] = []  # type: ignore[index]
    assert list(tmp_path.iterdir()) == []
