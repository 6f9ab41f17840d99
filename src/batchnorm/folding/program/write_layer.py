"""A layer as the operators that compute it, in a program's graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Module

from batchnorm.folding.program.state import State
from batchnorm.observers import detect_fake_mode

__all__ = ["emit_layer"]

_aten = torch.ops.aten
_Hold: TypeAlias = Callable[[str, Tensor], Node]


def emit_layer(state: State, node: Node, operator: str, layer: Module, hold: _Hold) -> None:
    """Make a node that reads a layer's input compute the layer.

    Args:
        state: of the program.
        node: its only argument is the input.
        operator: the name of the layer's operator.
        layer: its settings and parameters.
        hold: returns the node that holds a parameter or buffer, given its name in the layer and its value.
    """
    settings: Any = layer
    read = node.args[0]
    weight = hold("weight", settings.weight)
    bias = None if getattr(settings, "bias", None) is None else hold("bias", settings.bias)
    args: tuple[Any, ...]
    if operator == "linear":
        target, args = _aten.linear.default, (read, weight, bias)
    elif operator == "embedding":
        padding = -1 if settings.padding_idx is None else settings.padding_idx
        target, args = _aten.embedding.default, (weight, read, padding, settings.scale_grad_by_freq, settings.sparse)
    elif operator == "batch_norm":
        mean, var = hold("running_mean", settings.running_mean), hold("running_var", settings.running_var)
        fixed = (False, settings.momentum, settings.eps, True)
        target, args = _aten.batch_norm.default, (read, weight, bias, mean, var, *fixed)
    elif "transpose" in operator:
        packet = getattr(_aten, operator)
        target = getattr(packet, packet.overloads()[0])
        sizes = (settings.stride, settings.padding, settings.output_padding)
        args = (read, weight, bias, *map(list, sizes), settings.groups, list(settings.dilation))
    else:
        target, args = _convolution(state, node, operator, layer, hold, weight, bias)
    node.target, node.args = target, args


def _convolution(
    state: State, node: Node, operator: str, layer: Any, hold: _Hold, weight: Node, bias: Node | None
) -> tuple[Any, tuple[Any, ...]]:
    packet = getattr(_aten, operator)
    read, padding = node.args[0], layer.padding
    if "border" in layer._buffers:
        read, padding = _pad_with_border(state, node, layer, hold), [0] * len(layer.kernel_size)
    target = packet.padding if isinstance(padding, str) else packet.default
    padding = padding if isinstance(padding, str) else list(padding)
    return target, (read, weight, bias, list(layer.stride), padding, list(layer.dilation), layer.groups)


def _pad_with_border(state: State, node: Node, layer: Any, hold: _Hold) -> Node:
    """Return the input padded with the border: with zeros, and then the border added where there is no input."""
    pads, dims = list(layer._reversed_padding_repeated_twice), len(layer.kernel_size)
    border = hold("border", layer.border.reshape(1, -1, *[1] * dims))
    with state.graph.inserting_before(node):
        read = node.args[0]
        one = _compute(state, _aten.slice.Tensor, (_compute(state, _aten.slice.Tensor, (read, 0, 0, 1)), 1, 0, 1))
        ones = _compute(state, _aten.ones_like.default, (one,))
        inside = _compute(state, _aten.constant_pad_nd.default, (ones, pads, 0.0))
        around = _compute(state, _aten.mul.Tensor, (_compute(state, _aten.rsub.Scalar, (inside, 1)), border))
        padded = _compute(state, _aten.constant_pad_nd.default, (read, pads, 0.0))
        return _compute(state, _aten.add.Tensor, (padded, around))


def _compute(state: State, target: Any, args: tuple[Any, ...]) -> Node:
    """Add a node, with the value that it has without data if the others have theirs."""
    node = state.graph.call_function(target, args)
    values = [arg.meta.get("val") if isinstance(arg, Node) else arg for arg in args]
    mode = detect_fake_mode(values)
    if mode is not None:
        # what is computed here asks nothing of the shapes that the program does not ask already
        with mode, mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext():
            node.meta["val"] = target(*values)
    return node
