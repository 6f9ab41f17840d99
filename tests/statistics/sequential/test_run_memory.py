"""The memory of a batch that waits: what operators made for it, while somebody holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.statistics.sequential.networks import images
from torch import Tensor, nn

from batchnorm.statistics import recalibrate
from batchnorm.statistics.sequential.disk_cache import DiskCache
from batchnorm.statistics.sequential.run_memory import RunMemory


def test_what_a_norm_returned_counts_as_the_batchs_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            kept = self.norm1(x)
            return kept + self.norm2(kept.sum((2, 3), keepdim=True))

    put, sizes = DiskCache.put, []

    def measuring(self: DiskCache, run: Any) -> None:
        sizes.append(run.storages.nbytes())
        put(self, run)

    monkeypatch.setattr(DiskCache, "put", measuring)
    batches = images(4, 4)
    recalibrate(Residual(), batches, memory=0, cache=tmp_path)
    assert max(sizes) >= batches[0].nbytes


def test_what_operators_made_counts_once_and_while_somebody_holds_it() -> None:
    memory = RunMemory([])
    x = torch.zeros(8)
    memory.note((x, x[:2], {"view": x.view(2, 4)}, "text", None))
    memory.note(x)
    assert memory.nbytes() == 32
    y = torch.zeros(4)
    memory.note([y])
    assert memory.nbytes() == 48
    assert len(memory.alive()) == 2
    del x
    assert memory.nbytes() == 16  # it keeps nothing alive


def test_memory_that_is_there_anyway_does_not_count() -> None:
    weight = torch.zeros(8)
    memory = RunMemory([weight])
    memory.note([weight, weight.view(2, 4), weight[1:]])
    assert memory.nbytes() == 0
    memory.note(torch.zeros(3, device="meta"))
    memory.note(torch.eye(3).to_sparse())
    assert memory.nbytes() == 0  # what has no storage of its own
    memory.hold([torch.zeros(100)[:3], torch.zeros(5)])
    assert memory.nbytes() == 32  # what is used of it


def test_an_address_that_is_used_again_is_another_storage() -> None:
    memory = RunMemory([])
    for _ in range(20):  # the allocator gives the same place again and again
        x = torch.zeros(1000)
        memory.note(x)
        assert memory.nbytes() == 4000
        del x
    assert memory.nbytes() == 0
