"""Layer, activation and norm: who follows whom, and when that is how a network was designed."""

from __future__ import annotations

import pytest
import torch
from tests.checks.flows import calls_of, flow
from torch import Tensor, nn

from batchnorm.checks.order import activated_layer, is_a_design

X = torch.zeros(2, 3, 8, 8)


def found(*between: nn.Module) -> tuple[str, str] | None:
    """The activation and the layer before the norm, by their operators."""
    graph = flow(nn.Sequential(nn.Conv2d(3, 3, 1), *between, nn.BatchNorm2d(3)), X)
    (norm,) = calls_of(graph, "batch_norm")
    pair = activated_layer(graph, norm)
    return None if pair is None else (pair[0].name, pair[1].name)


@pytest.mark.parametrize(
    ("between", "activation"),
    [
        ([nn.ReLU()], "relu"),
        ([nn.ReLU(inplace=True)], "relu_"),
        ([nn.ReLU(), nn.Dropout()], "relu"),
        ([nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d()], "relu"),
    ],
)
def test_an_activation_behind_a_layer_is_found_behind_dropout_and_pooling(
    between: list[nn.Module], activation: str
) -> None:
    assert found(*between) == (activation, "conv2d")


@pytest.mark.parametrize(
    "between",
    [
        [],
        [nn.Sigmoid()],  # not of the ReLU's family
        [nn.ReLU(), nn.AvgPool2d(2)],  # an average mixes what the activation cut
        [nn.MaxPool2d(2)],
        [nn.MaxPool2d(2), nn.ReLU()],  # the activation does not read the layer
    ],
)
def test_other_neighbours_are_none(between: list[nn.Module]) -> None:
    assert found(*between) is None


def test_what_somebody_else_reads_too_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.dropout(self.conv(x).relu(), training=True)
            return self.norm(y) + y

    graph = flow(Twice(), X)
    assert activated_layer(graph, *calls_of(graph, "batch_norm")) is None


def network(after: int, before: int) -> nn.Module:
    """So many norms after activations, so many before them."""
    layers: list[nn.Module] = []
    for _ in range(after):
        layers += [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)]
    for _ in range(before):
        layers += [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("after", "before", "design"),
    [(10, 0, True), (9, 0, False), (10, 1, True), (10, 2, False), (18, 2, True), (17, 2, False), (0, 12, False)],
)
def test_ten_norms_and_nine_tenths_of_all_make_a_design(after: int, before: int, design: bool) -> None:
    assert is_a_design(flow(network(after, before), X)) is design
