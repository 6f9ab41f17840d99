"""A small network with three norms, batches for it, and how far what is stored is from what norms meet."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.statistics import recalibrate
from batchnorm.statistics.collect import Collector
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.sites import Site, Sites
from batchnorm.statistics.tally import Tally

__all__ = ["OnStored", "assert_alike", "expected", "gap", "images", "network"]


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


def gap(model: nn.Module, batches: list[Any], forward: Callable[..., Any] | None = None) -> float:
    """How far the stored statistics are from what the norms meet in eval mode, relative to σ + |mean|, and to σ²."""
    model.eval()
    collector = OnStored(Sites(model, None), Pooled)
    for index, batch in enumerate(batches):
        collector.run(index, lambda batch=batch: forward(model, batch) if forward else model(batch))
    worst = 0.0
    for site, tally in collector.tallies.items():
        mean, variance = tally.estimator.statistics()
        scale = variance + tally.eps
        worst = max(
            worst,
            float(((site.running_mean.double() - mean).abs() / (scale.sqrt() + mean.abs())).max()),
            float(((site.running_var.double() - variance).abs() / scale).max()),
        )
    return worst
