from __future__ import annotations

import copy

from torch import nn

import batchnorm


def with_momentum(net: nn.Module, momentum: float, last: list) -> nn.Module:
    net = copy.deepcopy(net).train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
    for batch in last:
        net(batch)
    return net.eval()


def test_the_statistics_of_the_last_batch(net, found, home) -> None:
    assert found(with_momentum(net, 0.99, [home[0], home[1][:8]])) == [("momentum_convention", "bn1")]


def test_a_small_momentum_is_nothing(net, found, home) -> None:
    assert found(with_momentum(net, 0.01, [home[0], home[1]])) == []


def test_a_large_momentum_of_a_recalibrated_model_is_nothing(net, found, home) -> None:
    net = with_momentum(net, 0.99, [home[0][:8]])
    batchnorm.recalibrate(net, home)
    assert found(net) == []
