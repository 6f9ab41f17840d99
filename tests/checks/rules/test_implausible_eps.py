from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check

X = torch.randn(4, 3, 6, 6)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, X, select="BN009").findings


def net(eps: float) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps), nn.ReLU()).eval()


@pytest.mark.parametrize("eps", [0.1, 1.0, 64, 0.0])
def test_flagged_and_fixed(eps: float) -> None:
    (finding,) = findings(net(eps))
    assert (finding.layer, f"eps is {eps:g}" in finding.message) == ("1", True)
    fixed = check(net(eps), X, select="BN009").fix(unsafe=True)
    assert fixed.model[1].eps == 1e-5
    assert findings(fixed.model) == []


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-5, 1e-3, 1e-2])
def test_not_flagged(eps: float) -> None:
    assert findings(net(eps)) == []


def test_a_function_has_no_fix() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True, eps=1)

    (finding,) = findings(Net())
    assert (finding.fix, finding.advice.startswith("Call batch_norm with eps=1e-5")) == (None, True)
