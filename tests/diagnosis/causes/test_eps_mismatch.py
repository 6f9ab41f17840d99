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


class Deep(nn.Module):
    """Nine norms, more than a cure names, and a norm of another kind with an ε of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [layer for _ in range(9) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
        self.blocks = nn.Sequential(*blocks)
        self.other = nn.InstanceNorm1d(1, eps=1e-4)

    def forward(self, x):
        return self.other(self.blocks(x)[:, None])[:, 0]


@pytest.mark.every(2)
@pytest.mark.parametrize("few", [True, False])
def test_the_cure_runs_as_it_is_printed_and_changes_the_wrong_norms_alone(few: bool) -> None:
    model, data = Deep(), torch.randn(1024, 16, generator=torch.Generator().manual_seed(1))
    norms = [layer for layer in model.blocks if isinstance(layer, nn.BatchNorm1d)]
    if few:
        model.blocks = model.blocks[:12]
        norms = norms[:4]
    with torch.no_grad():
        for layer in model.blocks:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(0.02)
    for norm in norms:
        norm.eps = 1e-3
    batchnorm.recalibrate(model, data.split(64))
    for norm in norms:
        norm.eps = 1e-5
    (finding,) = batchnorm.diagnose(model.eval(), data.split(64)).findings
    assert finding.cause == "eps_mismatch"
    exec(finding.cure, {"model": model})
    assert {norm.eps for norm in norms} == {1e-3}
    assert model.other.eps == 1e-4
    assert not any("eps" in vars(module) for module in model.modules() if "Norm" not in type(module).__name__)
    assert not batchnorm.diagnose(model, data.split(64)).findings
