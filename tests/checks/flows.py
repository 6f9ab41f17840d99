"""What rules and fixes are tried on: the dataflow of a small model, its calls by their names, a model of two ways."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from batchnorm.dataflow.graph import Call, Graph
from batchnorm.dataflow.operator_kinds import family
from batchnorm.dataflow.trace import trace

__all__ = ["TwoWays", "calls_of", "flow"]


def flow(model: nn.Module, *inputs: Any) -> Graph:
    return trace(model, inputs)


def calls_of(graph: Graph, name: str) -> list[Call]:
    return [call for call in graph.calls if family(call) == name]


class TwoWays(nn.Module):
    """Normalizes in training alone, so that its dataflow depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) if self.training else y
