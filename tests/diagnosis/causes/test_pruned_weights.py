from __future__ import annotations

import torch


def prune(layer, share: float) -> None:
    with torch.no_grad():
        weight = layer.weight
        weight[weight.abs() < weight.abs().flatten().quantile(share)] = 0.0


def test_one_layer(net, found) -> None:
    prune(net.fc3, 0.7)
    assert found(net)[0] == ("pruned_weights", "bn3")


def test_filters_set_to_zero_whole(net, found) -> None:
    with torch.no_grad():
        net.conv2.weight[:8] = 0.0
    assert found(net)[0] == ("pruned_weights", "bn2")


def test_pruned_and_recalibrated_is_nothing(net, found, home) -> None:
    import batchnorm

    prune(net.fc3, 0.7)
    batchnorm.recalibrate(net, home)
    assert found(net) == []
