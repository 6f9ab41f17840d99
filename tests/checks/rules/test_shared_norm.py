from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check


class Net(nn.Module):
    def __init__(self, forward: Any, **options: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm, self.twin = nn.BatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, torch.randn(4, 3, 6, 6), select="BN012").findings


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_finding_names_the_layers(training: bool) -> None:
    model = Net(lambda net, x: net.norm(net.c(F.relu(net.norm(net.b(F.relu(net.norm(net.a(x)))))))))
    (finding,) = findings(model.train(training))
    assert (finding.layer, finding.fix) == ("norm", None)
    assert "3 layers (a, b, c)" in finding.message


def test_statistics_that_two_modules_hold_are_shared() -> None:
    model = Net(lambda net, x: net.norm(net.a(x)) + net.twin(net.b(x)))
    assert findings(model) == []
    model.twin.running_mean = model.norm.running_mean
    assert [f.layer for f in findings(model)] == ["twin"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.norm(net.a(x)) * net.norm(net.a(x + 1)),  # siamese
        lambda net, x: net.norm(net.a(net.norm(net.a(x)))),  # a block that is applied twice
        lambda net, x: net.norm(net.a(x) + net.b(x)),
        lambda net, x: net.norm(net.a(x)) + net.twin(net.b(x)),
    ],
)
def test_not_flagged(forward: Any) -> None:
    assert findings(Net(forward)) == []


def test_without_running_statistics_there_is_nothing_to_mix() -> None:
    assert findings(Net(lambda net, x: net.norm(net.a(x)) + net.norm(net.b(x)), track_running_stats=False)) == []
