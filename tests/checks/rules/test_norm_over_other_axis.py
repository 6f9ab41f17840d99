from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check


class Net(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.linear, self.conv, self.conv1 = nn.Linear(6, 6), nn.Conv2d(6, 6, 1), nn.Conv1d(6, 6, 1)
        self.norm, self.norm1 = nn.BatchNorm2d(6), nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 6)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def findings(forward: Any, *shape: int) -> list[Finding]:
    return check(Net(forward), torch.randn(shape), select="BN011").findings


@pytest.mark.parametrize(
    ("forward", "shape", "axis"),
    [
        (lambda net, x: net.norm1(net.linear(x)), (4, 6, 6), 2),  # sizes that fit by luck
        (lambda net, x: net.norm1(F.gelu(net.linear(F.relu(x * 2)) + 1)), (4, 6, 6), 2),
        (lambda net, x: net.norm1(net.linear(net.linear(x))), (4, 6, 6), 2),
        (lambda net, x: net.norm(net.linear(x)), (2, 6, 5, 6), 3),
        (lambda net, x: net.norm(net.conv(x).permute(0, 2, 3, 1)), (2, 6, 6, 6), 3),
        (lambda net, x: net.norm(net.linear(net.conv(x).permute(0, 2, 3, 1))), (2, 6, 6, 6), 3),
        (lambda net, x: net.norm1(net.lstm(x)[0]), (9, 6, 6), 2),
        (lambda net, x: net.norm1(net.conv(x)), (6, 6, 6), 0),  # a convolution without a batch axis
    ],
)
def test_flagged(forward: Any, shape: tuple[int, ...], axis: int) -> None:
    (finding,) = findings(forward, *shape)
    assert finding.fix is None
    assert f"the features are on axis {axis}" in finding.message
    assert f"norm(x.transpose(1, {axis})).transpose(1, {axis})" in finding.advice


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda net, x: net.norm1(net.linear(x)), (4, 6)),
        (lambda net, x: net.norm1(x), (4, 6, 6)),
        (lambda net, x: net.norm1(net.linear(x).transpose(1, 2)), (4, 6, 6)),
        (lambda net, x: net.norm1(net.linear(x).flatten(0, 1)), (4, 6, 6)),
        (lambda net, x: net.norm1(net.linear(x.transpose(1, 2))), (4, 6, 6)),  # along positions, turned on purpose
        (lambda net, x: net.norm1(net.linear(net.conv1(x))), (4, 6, 6)),  # the same, behind a convolution
        (lambda net, x: net.norm(net.conv(net.linear(x))), (2, 6, 6, 6)),
        (lambda net, x: net.norm(net.linear(net.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), (2, 6, 6, 6)),
        (lambda net, x: net.norm1(net.lstm(x)[0].permute(1, 2, 0)), (9, 4, 6)),
    ],
)
def test_not_flagged(forward: Any, shape: tuple[int, ...]) -> None:
    assert findings(forward, *shape) == []
