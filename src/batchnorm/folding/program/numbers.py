"""Numbers that a program computes while it runs, of sizes and of values: operands that are no constants.

A run shows such a number as the one that it is then. So that a map meets a computed tensor where it meets one, it is
made a tensor in the modules that a program is opened to; the program itself stays as it is.
"""

from __future__ import annotations

import builtins
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

__all__ = ["numbers_as_tensors"]

_OF_TENSORS = {
    *(torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int, len),
    *(torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default),
}
_METHODS = {"dim", "item", "ndimension", "nelement", "numel"}
_MODULES = {operator.__name__, math.__name__, builtins.__name__, "_operator", "torch.fx.experimental.sym_node"}
_ARITHMETIC = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul),
    *(operator.itruediv, torch.add, torch.sub, torch.mul, torch.div, torch.true_divide),
    *(getattr(torch.ops.aten, name).Tensor for name in ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_")),
}
_ARITHMETIC_METHODS = {f"{name}{end}" for name in ("add", "sub", "mul", "div", "true_divide") for end in ("", "_")}


def numbers_as_tensors(graph: Graph) -> None:
    """Let sums and products of tensors with computed numbers be those with tensors of one element."""
    numbers: set[Node] = set()
    shapes: set[Node] = set()
    for node in list(graph.nodes):
        if _is_shape(node):
            shapes.add(node)
        elif _is_number(node, numbers, shapes):
            numbers.add(node)
        elif _is_arithmetic(node):
            with graph.inserting_before(node):
                made = {n: graph.call_function(_tensor, (n,)) for n in node.all_input_nodes if n in numbers}
            for number, tensor in made.items():
                node.replace_input_with(number, tensor)


def _tensor(number: Any) -> Tensor:
    """Return a number as a tensor that gives no other type to what it is added to."""
    return torch.scalar_tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64, device="cpu")


def _is_shape(node: Node) -> bool:
    attribute = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    return attribute or (node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs)


def _is_number(node: Node, numbers: set[Node], shapes: set[Node]) -> bool:
    if node.op == "call_method":
        return node.target in _METHODS or (node.target == "size" and not _is_shape(node))
    if node.op != "call_function":
        return False
    if node.target in _OF_TENSORS:
        return True
    if node.target is operator.getitem:
        return node.args[0] in shapes and not isinstance(node.args[1], slice)
    module = getattr(node.target, "__module__", None)
    computes = module in _MODULES or getattr(node.target, "__name__", "").startswith("sym_")
    return computes and bool(node.all_input_nodes) and all(read in numbers for read in node.all_input_nodes)


def _is_arithmetic(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _ARITHMETIC_METHODS
    return node.op == "call_function" and node.target in _ARITHMETIC
