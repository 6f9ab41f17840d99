from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.trace import trace
from batchnorm.verification.same_dataflow import dataflow_difference


class Net(nn.Module):
    def __init__(self, forward: Callable[[Net, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self._forward = forward

    def forward(self, x: Tensor) -> object:
        return self._forward(self, x)


def graph_of(forward: Callable[[Net, Tensor], object]) -> Graph:
    return trace(Net(forward).eval(), torch.randn(3, 4))


BASE = graph_of(lambda net, x: F.relu(net.a(x)) + 1)


def test_the_same_model_does_not_differ() -> None:
    assert dataflow_difference(BASE, graph_of(lambda net, x: F.relu(net.a(x)) + 1), (), {}, ()) is None


@pytest.mark.parametrize(
    ("forward", "phrase"),
    [
        (lambda net, x: F.gelu(net.a(x)) + 1, "gelu runs instead of relu"),
        (lambda net, x: F.relu(net.b(x)) + 1, "linear in a gets other arguments"),
        (lambda net, x: F.relu(net.a(x)) + 2, "add in the model gets other arguments"),
        (lambda net, x: F.relu(net.a(x)) + x, "add in the model gets other arguments"),
        (lambda net, x: F.relu(net.a(x)), "2 operators run instead of 3"),
        (lambda net, x: (F.relu(net.a(x)) + 1).neg(), "4 operators run instead of 3"),
        (lambda net, x: (F.relu(net.a(x)) + 1, x)[1], "other values are returned"),
        (lambda net, x: F.relu(F.linear(x, net.a.weight)) + 1, "gets other arguments"),
        (lambda net, x: F.relu(net.norm(net.a(x))) + 1, "batch_norm runs instead of relu"),
    ],
)
def test_every_other_computation_differs(forward: Callable[[Net, Tensor], object], phrase: str) -> None:
    found = dataflow_difference(BASE, graph_of(forward), (), {}, ())
    assert found is not None
    assert phrase in found


def test_inserted_norms_and_dropped_tensors_are_allowed_where_they_are_named() -> None:
    normed = graph_of(lambda net, x: F.relu(net.norm(net.a(x))) + 1)
    assert dataflow_difference(BASE, normed, {"norm"}, {}, ()) is None
    bare = graph_of(lambda net, x: F.relu(F.linear(x, net.a.weight)) + 1)
    assert dataflow_difference(BASE, bare, (), {}, {"a.bias"}) is None
    assert dataflow_difference(BASE, bare, (), {}, {"b.bias"}) is not None
    renamed = {"a.weight": "b.weight", "a.bias": "b.bias"}
    assert dataflow_difference(BASE, graph_of(lambda net, x: F.relu(net.b(x)) + 1), (), renamed, ()) is None


def test_a_value_taken_before_an_inserted_norm_counts_as_the_same() -> None:
    before = graph_of(lambda net, x: net.a(x) + 1)

    def after(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        net.norm(y)  # whose output nobody reads
        return y + 1

    assert dataflow_difference(before, graph_of(after), {"norm"}, {}, ()) is None
