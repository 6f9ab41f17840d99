from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from batchnorm.diagnosis.causes.dead_channels import _small_gamma


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


@pytest.mark.parametrize(("low", "dead"), [(0.1, 6), (-0.1, 0), (-0.01, 6)])
def test_gamma_on_both_sides_of_zero_was_initialized_there(low: float, dead: int) -> None:
    gamma = torch.cat([torch.zeros(6), torch.linspace(low, 0.1, 26)])
    layer = SimpleNamespace(record=SimpleNamespace(weight=gamma), stored=(gamma, gamma))
    assert int(_small_gamma(layer).sum()) == dead
