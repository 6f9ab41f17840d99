"""Which values of a program do not depend on its inputs: its state, and what is computed of that alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Module

from batchnorm.observers import OperatorMode

__all__ = ["Constants", "attribute"]


class Constants:
    """The values of a graph's nodes that are the same in every run; computed when they are asked for.

    Args:
        program: the graph with its state.
        written: names of the states that running the program writes into: they are none.
    """

    def __init__(self, program: GraphModule, written: Collection[str]) -> None:
        self._program = program
        self._values: dict[Node, Any] = {}
        self._nodes: set[Node] = set()
        for node in program.graph.nodes:
            is_state = node.op == "get_attr" and node.target not in written
            if is_state or (_may_be_constant(node) and all(read in self._nodes for read in node.all_input_nodes)):
                self._nodes.add(node)

    def tensor(self, node: object) -> Tensor | None:
        """Return the tensor that a node holds; None where it holds another thing, or not the same in every run."""
        if not isinstance(node, Node) or node not in self._nodes:
            return None
        try:
            value = attribute(self._program, node.target) if node.op == "get_attr" else self._value(node)
        except _NoConstantError:
            return None
        return value if isinstance(value, Tensor) else None

    def _value(self, node: Node) -> Any:
        """Return a node's value; of a state, a copy that may be written into."""
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def _compute(self, node: Node) -> Any:
        if node.op == "get_attr":
            state = attribute(self._program, node.target)
            return state.detach().clone() if isinstance(state, Tensor) else state
        args = map_arg(node.args, self._value)
        kwargs = map_arg(node.kwargs, self._value)
        target: Any = node.target
        with torch.no_grad(), _Pure():  # type: ignore[no-untyped-call]
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)


class _NoConstantError(Exception):
    """The value is drawn at random, or written into what it is computed of."""


class _Pure(OperatorMode):
    """Refuses operators that are random or write into what they read."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable:
            raise _NoConstantError
        return func(*args, **(kwargs or {}))


def attribute(program: Module, target: Any) -> Any:
    """Return what a ``get_attr`` node of that target reads."""
    value: Any = program
    for part in str(target).split("."):
        value = getattr(value, part)
    return value


def _may_be_constant(node: Node) -> bool:
    """Whether a node computes something of others."""
    higher = isinstance(node.target, torch._ops.HigherOrderOperator)
    return node.op in ("call_function", "call_method") and bool(node.all_input_nodes) and not higher
