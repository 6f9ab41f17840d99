"""The nodes of a program that are layers: convolutions, linear layers, embeddings and norms with parameters of its own.

Exported programs write one layer in several ways (``conv2d`` or ``convolution``, ``linear`` or ``addmm`` of a
transposed weight); each is brought to the one that the rest of this package knows.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import Module
from torch.nn import functional as F

from batchnorm.dataflow.layer_of_call import PLAIN_LAYERS, plain_layer
from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.program.constants import Constants
from batchnorm.nn.operators import named_arguments

__all__ = ["LayerNode", "find_layer_nodes"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class LayerNode:
    """A node that is a layer.

    Attributes:
        node: the node.
        result: the node that holds its output: itself, or what takes the first of several.
        operator: the name, in the aten namespace, of the operator that it is.
        args: the arguments of that by name; nodes where the program has nodes, tensors where it computes them.
        input: the name of the argument that is no parameter.
        layer: what computes the same, with copies of the parameters.
    """

    node: Node
    result: Node
    operator: str
    args: Mapping[str, Any]
    input: str
    layer: Module

    @property
    def read(self) -> Node:
        """The node whose output it reads."""
        node: Node = self.args[self.input]
        return node


def find_layer_nodes(graph: Graph, constants: Constants) -> list[LayerNode]:
    """Return the layers of a graph, in order."""
    sites = (_site(node, constants) for node in graph.nodes if node.op == "call_function")
    return [site for site in sites if site is not None]


def _site(node: Node, constants: Constants) -> LayerNode | None:
    found = _arguments(node)
    if found is None:
        return None
    name, args = _in_one_form(*found, constants)
    key = "indices" if name == "embedding" else "input"
    if name not in PLAIN_LAYERS or not isinstance(args.get(key), Node):
        return None
    result = _only_result(node)
    tensors = {k: _held(args[k], constants) for k in _TENSORS if args.get(k) is not None}
    others = [v for k, v in args.items() if k not in (key, *_TENSORS)]
    if result is None or "weight" not in args or any(tensor is None for tensor in tensors.values()) or _dynamic(others):
        return None
    if name != "batch_norm" and "weight" not in tensors:
        return None
    try:
        layer = plain_layer(name, {**args, **tensors})
    except Refusal:
        return None
    return LayerNode(node, result, name, args, key, layer)


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


# -- which operator, with which arguments ----------------------------------------------------------------------------

_FUNCTIONS: Mapping[Any, Any] = {
    F.conv1d: torch.ops.aten.conv1d.default,
    F.conv2d: torch.ops.aten.conv2d.default,
    F.conv3d: torch.ops.aten.conv3d.default,
    F.conv_transpose1d: torch.ops.aten.conv_transpose1d.default,
    F.conv_transpose2d: torch.ops.aten.conv_transpose2d.input,
    F.conv_transpose3d: torch.ops.aten.conv_transpose3d.input,
    F.linear: torch.ops.aten.linear.default,
    torch.batch_norm: torch.ops.aten.batch_norm.default,
}
"""Functions that take their arguments as their operator does."""


def _arguments(node: Node) -> tuple[str, dict[str, Any]] | None:
    """Return the operator that a node calls, and its arguments by their names in its schema."""
    target: Any = node.target
    if target is F.batch_norm:
        return "batch_norm", {"cudnn_enabled": True, **_bound(node)}
    if target is F.embedding:
        return _embedding(_bound(node))
    target = _FUNCTIONS.get(target, target)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    return target._schema.name.split("::")[1], named_arguments(target, node.args, node.kwargs)


def _bound(node: Node) -> dict[str, Any]:
    target: Any = node.target
    bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _embedding(args: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    if args["max_norm"] is not None:  # it writes into the table
        return None
    named = {key: args[key] for key in ("weight", "scale_grad_by_freq", "sparse")}
    padding = -1 if args["padding_idx"] is None else args["padding_idx"]
    return "embedding", {"indices": args["input"], "padding_idx": padding, **named}


# -- one form for one layer ------------------------------------------------------------------------------------------

_Form = Callable[[dict[str, Any], Constants], "tuple[str, dict[str, Any]] | None"]


def _in_one_form(name: str, args: dict[str, Any], constants: Constants) -> tuple[str, dict[str, Any]]:
    form = _FORMS.get(name)
    found = None if form is None else form(args, constants)
    return (name, args) if found is None else found


def _convolution(args: dict[str, Any], constants: Constants) -> tuple[str, dict[str, Any]] | None:
    weight = constants.tensor(args["weight"])
    if weight is None:
        return None
    kind = "conv_transpose" if args["transposed"] else "conv"
    kept = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    own = ("output_padding",) if args["transposed"] else ()
    return f"{kind}{weight.dim() - 2}d", {key: args[key] for key in (*kept, *own)}


def _addmm(args: dict[str, Any], constants: Constants) -> tuple[str, dict[str, Any]] | None:
    weight, bias = constants.tensor(args["mat2"]), constants.tensor(args["self"])
    if weight is None or bias is None or bias.shape != weight.shape[1:] or (args["alpha"], args["beta"]) != (1, 1):
        return None
    return "linear", {"input": args["mat1"], "weight": weight.t(), "bias": args["self"]}


def _mm(args: dict[str, Any], constants: Constants) -> tuple[str, dict[str, Any]] | None:
    weight = constants.tensor(args.get("mat2", args.get("other")))
    if weight is None or weight.dim() != 2:
        return None
    return "linear", {"input": args["self"], "weight": weight.t(), "bias": None}


def _norm(args: dict[str, Any], constants: Constants) -> tuple[str, dict[str, Any]] | None:
    del constants
    return "batch_norm", {"training": False, "cudnn_enabled": True, **args}


_FORMS: Mapping[str, _Form] = {
    "addmm": _addmm,
    "convolution": _convolution,
    "matmul": _mm,
    "mm": _mm,
    "_native_batch_norm_legit_no_training": _norm,
    "native_batch_norm": _norm,
    "_native_batch_norm_legit": _norm,
}
