"""Blocks of ``use`` around a measurement do not count for it; those in the model's own forward do, and are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.statistics import recalibrate, update_bn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5))


def data() -> list[Tensor]:
    return list((torch.randn(48, 4, generator=torch.Generator().manual_seed(1)) * 2 + 1).split(12))


@pytest.mark.parametrize("names", [None, "*"])
@pytest.mark.parametrize("order", ["sequential", "parallel"])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("train", [True, False])
def test_a_block_around_it_changes_nothing(statistics: str, order: Any, names: Any, train: bool) -> None:
    model, twin, batches = network().train(train), network().train(train), data()
    recalibrate(twin, batches, order=order, names=names)
    with batchnorm.use(statistics, model), batchnorm.no_update(model):
        result = recalibrate(model, batches, order=order, names=names)
    assert [layer.name for layer in result.layers] == ["0", "2"]
    assert result.left == ()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_the_block_holds_again_afterwards() -> None:
    model, batches = network().eval(), data()
    with batchnorm.use("batch", model):
        before = model(batches[0])
        update_bn(batches, model)
        torch.testing.assert_close(model(batches[0]), before)


class Guarded(nn.Module):
    """A backbone on other statistics than the mode says, in the model's own code."""

    def __init__(self, statistics: str) -> None:
        super().__init__()
        self.statistics = statistics
        self.backbone, self.head = network(), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        with batchnorm.use(self.statistics, self.backbone):
            x = self.backbone(x)
        out: Tensor = self.head(x.relu())
        return out


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_a_backbone_on_its_running_statistics_is_measured(order: Any) -> None:
    model, batches = Guarded("running"), data()
    plain = nn.Sequential(*copy.deepcopy(model.backbone), nn.ReLU(), nn.BatchNorm1d(5))
    recalibrate(model, batches, order=order)
    recalibrate(plain, batches, order=order)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_a_backbone_on_each_batch_is_left_with_the_reason(order: Any) -> None:
    model, batches = Guarded("batch"), data()
    before = copy.deepcopy(model.backbone.state_dict())
    result = recalibrate(model, batches, order=order)
    assert [layer.name for layer in result.layers] == ["head"]
    assert {left.name for left in result.left} == {"backbone.0", "backbone.2"}
    assert all("a block use('batch', ...)" in left.reason for left in result.left)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    with torch.no_grad():  # the head meets what each batch makes of itself
        met = torch.cat([_on_batch(model.backbone, b).relu() for b in batches])
    torch.testing.assert_close(model.head.running_mean, met.mean(0))
    torch.testing.assert_close(model.head.running_var, met.var(0))


def _on_batch(model: nn.Module, x: Tensor) -> Tensor:
    with batchnorm.use("batch", model):
        out: Tensor = model.eval()(x)
    return out
