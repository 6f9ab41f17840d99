"""A small network with three norms, batches for it, and what measuring it right gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.statistics import recalibrate
from batchnorm.statistics.collect import Collector
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.sites import Site
from batchnorm.statistics.tally import Tally

__all__ = ["OnStored", "assert_alike", "expected", "images", "network"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Tanh(), nn.BatchNorm2d(4))


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 8, 8, generator=generator) * (1 + i % 3) + i % 2 for i, n in enumerate(sizes)]


def expected(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """The same model, measured with all batches waiting in memory."""
    twin = copy.deepcopy(model)
    recalibrate(twin, batches)
    return twin


def assert_alike(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(dict(a.named_buffers()), dict(b.named_buffers()))


class OnStored(Collector):
    """The norms run as they would without this mode: in eval mode, on the stored statistics."""

    def _normalize(self, site: Site, call: NormCall, met: Moments, tally: Tally) -> Any:
        return call.run()
