from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.checks import Finding, check

X = torch.randn(4, 3, 6, 6)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, X, select="BN008").findings


def net(momentum: float | None, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum, **options), nn.ReLU())


@pytest.mark.parametrize(
    ("momentum", "better"), [(0.9, 0.1), (0.99, 0.01), (0.999, 0.001), (1.0, 0.1), (0.0, 0.1), (-0.1, 0.1), (1.5, 0.1)]
)
def test_flagged_and_fixed(momentum: float, better: float) -> None:
    (finding,) = findings(net(momentum))
    assert f"momentum is {momentum:g}" in finding.message
    fixed = check(net(momentum), X, select="BN008").fix(unsafe=True)
    assert fixed.model[1].momentum == better
    assert findings(fixed.model) == []
    assert findings(net(better)) == []


@pytest.mark.parametrize("momentum", [None, 0.0003, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_not_flagged(momentum: float | None, training: bool) -> None:
    assert findings(net(momentum).train(training)) == []


def test_a_momentum_that_is_never_used_is_not_meant() -> None:
    assert findings(net(0.99, track_running_stats=False)) == []
    frozen = net(0.99)
    batchnorm.freeze(frozen)
    assert findings(frozen) == []


def test_statistics_that_are_kept_as_they_were_measured_are_a_choice() -> None:
    model = net(0.1)
    model(X)
    model[1].momentum = 0.0
    assert findings(model) == []
    new = net(0.1)
    with batchnorm.no_update(new):
        assert findings(new) == []


def test_the_layers_of_this_library_count() -> None:
    (finding,) = findings(batchnorm.convert(net(0.99)).model)
    assert finding.layer == "1"


class Functional(nn.Module):
    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training, momentum=self.momentum)


def test_functions_count_where_they_read_it() -> None:
    (finding,) = findings(Functional(0.99))
    assert (finding.fix, finding.advice.startswith("Call batch_norm with momentum=0.01")) == (None, True)
    assert findings(Functional(0.99).eval()) == []
    assert findings(Functional(1.0)) == []  # the first batch of an average that code keeps
