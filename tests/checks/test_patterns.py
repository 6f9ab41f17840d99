from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.checks.patterns import layer_name, source, swap
from batchnorm.dataflow.trace import trace
from batchnorm.errors import StateError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))


def test_neighbours_change_places_and_keep_their_names() -> None:
    model = net()
    graph = trace(model, torch.randn(2, 3, 4, 4))
    relu, norm = (next(c for c in graph.calls if c.name == name) for name in ("relu", "batch_norm"))
    exchange = swap(model, graph, relu, norm)
    assert exchange is not None
    assert exchange(model) == ({}, [])
    assert list(model._modules) == ["0", "2", "1"]
    assert swap(model, graph, norm, norm) is None


@pytest.mark.parametrize(
    "other", [nn.ReLU(), nn.Sequential(nn.ReLU()), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.ModuleList(net())]
)
def test_a_model_that_has_changed_is_refused(other: nn.Module) -> None:
    model = net()
    graph = trace(model, torch.randn(2, 3, 4, 4))
    relu, norm = (next(c for c in graph.calls if c.name == name) for name in ("relu", "batch_norm"))
    exchange = swap(model, graph, relu, norm)
    assert exchange is not None
    with pytest.raises(StateError, match="Call check on the model as it is now"):
        exchange(other)


def test_names_and_sources() -> None:
    graph = trace(net(), torch.randn(2, 3, 4, 4))
    conv, relu = graph.calls[0], graph.calls[1]
    assert layer_name(conv) == "0"
    assert layer_name(relu) == "1"
    assert source(relu.output) is relu
    assert source(graph.inputs[0]) is None
