"""The memory of a batch that waits: what operators made for it, while somebody holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.statistics.sequential.networks import images
from torch import Tensor, nn

from batchnorm.statistics import recalibrate
from batchnorm.statistics.sequential.disk_cache import DiskCache


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
