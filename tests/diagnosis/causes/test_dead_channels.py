from __future__ import annotations

import torch


def test_gamma_of_zero(net, found) -> None:
    with torch.no_grad():
        net.bn3.weight[:6] = 0.0
    assert found(net)[0] == ("dead_channels", "bn3")


def test_channels_that_do_not_vary_and_statistics_that_know(net, found) -> None:
    with torch.no_grad():
        net.conv2.weight[:5] = 0.0
    net.bn2.running_mean[:5] = 0.0
    net.bn2.running_var[:5] = 1e-12
    net.bn3.running_mean.copy_(net.bn3.running_mean)
    assert ("dead_channels", "bn2") in found(net)


def test_a_small_gamma_is_not_dead(net, found) -> None:
    with torch.no_grad():
        net.bn4.weight[:6] *= 0.05
    assert found(net) == []


def test_most_channels_do_not_vary(net, found) -> None:
    with torch.no_grad():
        net.conv2.weight[:12] *= 1e-9
    net.bn2.running_mean[:12] = 0.0
    net.bn2.running_var[:12] = 1e-12
    assert ("dead_channels", "bn2") in found(net)
