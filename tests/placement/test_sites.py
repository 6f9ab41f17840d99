from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.dataflow.trace import trace
from batchnorm.placement.sites import Placement, find_placements, norm_calls, obstacle


class Net(nn.Module):
    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(4)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def sites(forward: Callable[[Net, Tensor], Tensor]) -> list[Placement]:
    return list(find_placements(trace(Net(forward).eval(), torch.randn(2, 4, 4, 4))))


@pytest.mark.parametrize(
    ("forward", "role"),
    [
        (lambda net, x: net.last(torch.sigmoid(net.a(x))), "hidden"),
        (lambda net, x: torch.sigmoid(net.a(x)) * 2, "output"),
        (lambda net, x: net.last(torch.sigmoid(net.a(x)) * net.norm.weight[0] + 1), "hidden"),
        (lambda net, x: net.last(x * (2 * torch.sigmoid(net.a(x)).flatten(1).view_as(x))), "gate"),
        (lambda net, x: net.last(torch.lerp(x, -x, torch.sigmoid(net.a(x)))), "gate"),
        (lambda net, x: net.last(torch.sigmoid(net.a(x)).mean((2, 3), keepdim=True).expand_as(x) * x), "gate"),
        (lambda net, x: net.last(F.relu(net.a(x))), "hidden"),
        (
            lambda net, x: net.last(x * torch.sigmoid(F.conv2d(F.relu(net.a(x)), net.last.weight, padding=1))),
            "gate branch",
        ),
    ],
)
def test_what_an_activation_is_for(forward: Callable[[Net, Tensor], Tensor], role: str) -> None:
    assert sites(forward)[0].role == role


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda net, x: net.last(torch.tanh(net.a(x))), False),
        (lambda net, x: net.last(torch.tanh(net.a(net.norm(x)))), True),
        (lambda net, x: net.last(net.norm(net.b(torch.tanh(net.a(x))))), True),
        (lambda net, x: net.last(torch.tanh(net.a(x))) + net.norm(x), False),
    ],
)
def test_whether_there_are_norms_on_the_way(forward: Callable[[Net, Tensor], Tensor], expected: bool) -> None:
    (site,) = sites(forward)
    assert site.norms_in_stack is expected


def test_pooling_and_dropout_lie_between() -> None:
    (site,) = sites(lambda net, x: net.last(F.relu_(F.max_pool2d(F.dropout(net.a(x)), 2))))
    assert obstacle(site) is None
    assert site.activation.name == "relu_"


def test_a_norm_of_weights_is_none_of_data() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        weight = F.batch_norm(net.a.weight.reshape(1, 4, -1) * 2, None, None, training=True).view_as(net.a.weight)
        return net.norm(F.conv2d(x, weight))

    calls = norm_calls(trace(Net(forward).eval(), torch.randn(2, 4, 4, 4)))
    assert [call.module for call in calls] == ["norm"]
