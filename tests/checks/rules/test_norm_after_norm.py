from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check

X = torch.randn(4, 3, 6, 6)


class Net(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def findings(forward: Any, *, training: bool = True) -> list[Finding]:
    return check(Net(forward).train(training), X, select="BN010").findings


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.a(x)),
        lambda net, x: net.b(net.a(x).clone().contiguous()),
        lambda net, x: F.relu(net.b(net.a(F.relu(x)))) + x,
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_flagged(forward: Any, training: bool) -> None:
    (finding,) = findings(forward, training=training)
    assert (finding.layer, finding.fix) == ("b", None)
    assert "the norm a has normalized" in finding.message


def test_a_function_is_a_norm_too() -> None:
    (finding,) = findings(lambda net, x: F.batch_norm(net.a(x), None, None, training=True))
    assert finding.layer == ""


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(F.relu(net.a(x))),
        lambda net, x: net.b(net.a(x) + x),
        lambda net, x: net.b(F.avg_pool2d(net.a(x), 2)),  # averages of what is correlated have another variance
        lambda net, x: (y := net.a(x)) + F.relu(net.b(y)),  # pre-activation behind a stem with a norm
        lambda net, x: (y := net.a(x), net.b(y)),
        lambda net, x: net.a(x) + net.b(x),
        lambda net, x: F.layer_norm(net.a(x), x.shape[1:]),
    ],
)
def test_not_flagged(forward: Any) -> None:
    assert findings(forward) == []
