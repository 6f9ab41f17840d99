"""The nodes of a program that are layers: convolutions, linear layers, embeddings and norms with parameters of its own.

Programs write one layer in several ways (``conv2d`` or ``convolution``, ``linear`` or ``addmm`` of a transposed
weight); the rows of :mod:`batchnorm.absorbers` know them all.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import Module

from batchnorm.absorbers.operator import AbsorbingOperator
from batchnorm.absorbers.table import ABSORBERS
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.program.constants import Constants

__all__ = ["LayerNode", "find_layer_nodes"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class LayerNode:
    """A node that is a layer.

    Attributes:
        node: the node.
        result: the node that holds its output: itself, or what takes the first of several.
        operator: what it computes.
        args: the arguments of that by name; nodes where the program has nodes, tensors where it computes them.
        layer: what computes the same, with copies of the parameters.
    """

    node: Node
    result: Node
    operator: AbsorbingOperator
    args: Mapping[str, Any]
    layer: Module

    @property
    def read(self) -> Node:
        """The node whose output it reads."""
        node: Node = self.args[self.operator.reads]
        return node


def find_layer_nodes(graph: Graph, constants: Constants) -> list[LayerNode]:
    """Return the layers of a graph, in order."""
    found = (_layer_node(node, constants) for node in graph.nodes if node.op == "call_function")
    return [layer for layer in found if layer is not None]


def _layer_node(node: Node, constants: Constants) -> LayerNode | None:
    for row in ABSORBERS.values():
        args = row.arguments(node.target, node.args, node.kwargs, constants.tensor)
        if args is not None:
            return _with_layer(node, row, args, constants)
    return None


def _with_layer(node: Node, row: AbsorbingOperator, args: Mapping[str, Any], constants: Constants) -> LayerNode | None:
    result = _only_result(node)
    tensors = {key: _held(args[key], constants) for key in _TENSORS if args.get(key) is not None}
    settings = [value for key, value in args.items() if key not in (row.reads, *_TENSORS)]
    if (
        result is None
        or not isinstance(args[row.reads], Node)
        or any(tensor is None for tensor in tensors.values())
        or _dynamic(settings)
    ):
        return None
    try:
        layer = row.layer({**args, **tensors})
    except Refusal:
        return None
    return LayerNode(node, result, row, args, layer)


def _held(value: Any, constants: Constants) -> Tensor | None:
    return value if isinstance(value, Tensor) else constants.tensor(value)


def _dynamic(values: list[Any]) -> bool:
    """Whether settings depend on the run."""
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return any(isinstance(item, Node) for item in flat)


def _only_result(node: Node) -> Node | None:
    """Return the node that holds the output; of an operator with several, if only the first is read."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.target._schema.returns) == 1:
        return node
    users = [user for user in node.users if user.target is operator.getitem]
    firsts = [user for user in users if user.args[1] == 0]
    others = [user for user in users if user.args[1] != 0 and user.users]
    return firsts[0] if len(firsts) == 1 and len(users) == len(node.users) and not others else None
