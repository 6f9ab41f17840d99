"""What a rule reads of a run: the dataflow of a small model, and its calls by their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm.dataflow.graph import Call, Graph
from batchnorm.dataflow.operator_kinds import family
from batchnorm.dataflow.trace import trace

__all__ = ["calls_of", "flow"]


def flow(model: nn.Module, *inputs: Any) -> Graph:
    return trace(model, inputs)


def calls_of(graph: Graph, name: str) -> list[Call]:
    return [call for call in graph.calls if family(call) == name]
