"""Which operators are drawn, and what leads to what when some are gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.dataflow.graph import Graph
from batchnorm.dataflow.trace import trace
from batchnorm.folding.report.neighbourhood import around, nearest, ways_to

X = torch.ones(2, 3, 6, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.next = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.next(torch.relu(y)) + torch.tanh(y) + torch.sigmoid(y) + y


@pytest.fixture
def graph() -> Graph:
    return trace(Net().eval(), X)


def shown(neighbourhood) -> tuple[list[str], list[tuple[str, str]]]:
    panel = neighbourhood.panel("", {})
    names = [node.name for node in panel.nodes]
    return names, [(names[a], names[b]) for a, b in panel.edges]


def test_what_is_read_and_who_reads_is_drawn_many_as_one(graph: Graph) -> None:
    conv, norm = graph.calls[:2]
    names, edges = shown(around(graph, {conv, norm}, ()))
    assert names == ["input", "conv2d", "batch_norm", "relu", "others"]
    assert edges == [("input", "conv2d"), ("conv2d", "batch_norm"), ("batch_norm", "relu"), ("batch_norm", "others")]


def test_of_an_end_only_dots_are_drawn(graph: Graph) -> None:
    names, _ = shown(around(graph, {graph.calls[0]}, (), {graph.calls[0]}))
    assert names == ["…", "conv2d", "…"]


def test_without_an_operator_the_one_before_leads_to_the_one_after(graph: Graph) -> None:
    conv, norm = graph.calls[:2]
    names, edges = shown(around(graph, {conv, norm}, {norm}).without({norm}))
    assert names == ["input", "conv2d", "relu", "others"]
    assert edges == [("input", "conv2d"), ("conv2d", "relu"), ("conv2d", "others")]


def test_a_norm_beside_that_is_gone_too_shows_what_is_behind_it(graph: Graph) -> None:
    norm, relu = graph.calls[1:3]
    view = around(graph, {relu}, {norm})
    assert shown(view)[0] == ["batch_norm", "relu", "conv2d"]
    assert shown(view.without({norm}))[0] == ["conv2d", "relu", "conv2d"]


def test_the_output_of_the_model_is_drawn(graph: Graph) -> None:
    assert shown(around(graph, {graph.calls[-1]}, ()))[0][-1] == "output"


def test_the_nearest_come_first(graph: Graph) -> None:
    norm = graph.calls[1]
    assert {call.name for call in nearest(graph, norm, set(graph.calls), 3)} == {"batch_norm", "conv2d", "relu"}
    assert nearest(graph, norm, {norm, graph.calls[-2]}, 3) == {norm}  # the last one is not reached within the set


def test_of_two_ways_that_are_as_short_the_one_past_the_last_operator_is_taken() -> None:
    class Dense(nn.Module):
        def forward(self, x):
            early, late = torch.tanh(x), torch.sigmoid(x)
            return torch.cat([early, late]), torch.stack([early, late])

    graph = trace(Dense(), X)
    assert [call.name for call in graph.calls] == ["tanh", "sigmoid", "cat", "stack"]
    _, late, cat, stack = graph.calls
    assert ways_to(graph, cat, [stack], 1) == {cat, late, stack}


def test_ways_lead_to_what_is_wanted(graph: Graph) -> None:
    norm, relu, after = graph.calls[1:4]
    assert after.name == "conv2d"
    assert ways_to(graph, norm, [after], 1) == {norm, relu, after}
    assert ways_to(graph, norm, [], 1) == {norm}
