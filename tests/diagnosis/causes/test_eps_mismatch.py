from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm


def test_one_norm(net, found) -> None:
    net.bn2.eps = 0.1
    with torch.no_grad():
        net.conv2.weight.mul_(0.1)
    net.bn2.running_mean.mul_(0.1)
    net.bn2.running_var.mul_(0.01)
    assert found(net)[0] == ("eps_mismatch", "bn2")


@pytest.mark.parametrize(("trained_with", "evaluated_with"), [(1e-3, 1e-5), (1e-5, 1e-3)])
def test_all_norms(net, found, home, trained_with: float, evaluated_with: float) -> None:
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for layer in (net.conv1, net.conv2, net.fc3, net.fc4):
            layer.weight.mul_(0.02)
        for norm in norms:
            norm.eps = trained_with
    batchnorm.recalibrate(net, home)
    for norm in norms:
        norm.eps = evaluated_with
    assert found(net)[0][0] == "eps_mismatch"


def test_another_eps_where_nobody_feels_it(net, found) -> None:
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        norm.eps = 1e-6
    assert found(net) == []
