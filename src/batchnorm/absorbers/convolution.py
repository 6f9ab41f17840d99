"""Convolutions: W of shape (Cout, Cin/groups, *kernel)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import Module
from torch.nn import functional as F

from batchnorm.absorbers.linear_operator import LinearOperator
from batchnorm.absorbers.operator import Constant, Hold, LayerParameters
from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.observers import detect_fake_mode
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed, Knowledge, location

__all__ = ["Convolution", "sizes"]

_aten = torch.ops.aten


class Convolution(LinearOperator):
    """``conv1d``, ``conv2d`` and ``conv3d``.

    Args:
        n: number of spatial axes.
    """

    kind: ClassVar[str] = "convolution"
    transposed: ClassVar[bool] = False
    _prefix: ClassVar[str] = "conv"
    _layers: ClassVar[Sequence[Any]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    _placed: ClassVar[Collection[str]] = ("stride", "padding", "dilation")
    _not_taken: ClassVar[Collection[str]] = ("transposed", "output_padding")

    def __init__(self, n: int) -> None:
        self.trailing = n
        self.name = f"{self._prefix}{n}d"
        self.forms = (self.name, "convolution")
        self.functions = {getattr(F, self.name): self._overload()}

    def _overload(self) -> Any:
        return getattr(_aten, self.name).default

    # -- which maps it absorbs -----------------------------------------------------------------------------------------

    def forward(self, call: Call, given: Mapping[Value, Map], known: Knowledge) -> Absorbed:
        """Absorb a map of the input channels; a shift only where no zeros are padded, or can be padded otherwise."""
        absorbed = super().forward(call, given, known)
        if absorbed.map.only_scales or not self._pads_with_zeros(call):
            return absorbed
        if not bool((absorbed.map.scale != 0).all()):
            raise Refusal(
                f"{location(call)} pads it with zeros, and the norm makes zero of nothing, where its scale is zero."
            )
        if not known.with_borders:
            raise Refusal(
                f"{location(call)} pads it with zeros, which the norm would not have made of zeros (with borders=True "
                "it pads with what makes them)."
            )
        return Absorbed(absorbed.side, absorbed.map, bordered=True)

    def _pads_with_zeros(self, call: Call) -> bool:
        """Whether zeros, which have not been shifted, are read where there is no input.

        Raises:
            Refusal: no shift can cross it at all.
        """
        padding = call.args.get("padding", 0)
        return padding == "same" if isinstance(padding, str) else any(sizes(padding, 1))

    # -- parameters ----------------------------------------------------------------------------------------------------

    def merge(self, call: Call, absorbed: Absorbed, now: LayerParameters, known: Knowledge) -> LayerParameters:
        """Return weight and bias; and what to pad with, so that the map makes of it what was padded with before."""
        new = super().merge(call, absorbed, now, known)
        if absorbed.side == "output" or (now.border is None and not absorbed.bordered):
            return new
        scale, shift = self.channels_of(call, absorbed)
        before = torch.zeros_like(shift) if now.border is None else now.border
        border = torch.where(scale == 0, 0.0, (before - shift) / scale)  # where s is 0, the weight is 0 as well
        return LayerParameters(new.weight, new.bias, border)

    def require_own_element(self, call: Call) -> None:
        """Require a middle tap that reads, for every element, the very element that is computed."""
        super().require_own_element(call)
        kernel = call.args["weight"].shape[2:]
        stride, dilation = (sizes(call.args.get(key, 1), len(kernel)) for key in ("stride", "dilation"))
        given = call.args.get("padding", 0)
        if given == "same":  # an odd kernel is padded alike on both sides
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        else:
            padding = list(sizes(0 if given == "valid" else given, len(kernel)))
        middle = all(2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True))
        if not middle or any(s != 1 for s in stride) or any(k % 2 == 0 for k in kernel):
            raise Refusal(f"No tap of {location(call)} reads the very element that it computes.")

    # -- costs ---------------------------------------------------------------------------------------------------------

    def padded_elements(self, call: Call) -> int:
        """Return the number of elements of the input with what it is padded with."""
        shape: Sequence[int] = call.args["input"].shape
        padding: Any = call.args["padding"]
        if isinstance(padding, str):
            taps = zip(call.args["dilation"], call.args["weight"].shape[2:], strict=True)
            pads = [d * (k - 1) if padding == "same" else 0 for d, k in taps]
        else:
            pads = [2 * int(pad) for pad in padding]
        inner = [size + pad for size, pad in zip(shape[-self.trailing :], pads, strict=True)]
        return math.prod(shape[: -self.trailing]) * math.prod(inner)

    # -- its layer -----------------------------------------------------------------------------------------------------

    def settings(self, args: Mapping[str, Any]) -> Module:
        """Return the layer with its settings."""
        weight, groups = args["weight"], args["groups"]
        channels = [weight.shape[0], weight.shape[1] * groups]  # (Cout, Cin), and the other way round if transposed
        into, out = channels if self.transposed else channels[::-1]
        placed = {key: v if isinstance(v := args[key], str) else sizes(v, self.trailing) for key in self._placed}
        conv: Module = self._layers[self.trailing - 1](
            into, out, tuple(weight.shape[2:]), **placed, groups=groups, bias=False, device="meta"
        )
        return conv

    # -- in programs ---------------------------------------------------------------------------------------------------

    def in_own_form(self, form: str, args: Mapping[str, Any], constant: Constant) -> Mapping[str, Any] | None:
        """Return the operator's arguments; ``convolution`` is one of as many axes as its weight says."""
        if form == self.name:
            return args
        weight = constant(args["weight"])
        if weight is None or weight.dim() - 2 != self.trailing or args["transposed"] != self.transposed:
            return None
        return {key: value for key, value in args.items() if key not in self._not_taken}

    def written(self, layer: Any, node: Node, hold: Hold) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments with which a node computes a layer, behind nodes that pad if need be."""
        target, args = super().written(layer, node, hold)
        if "border" not in layer._buffers:
            return target, args
        _, weight, bias, stride, _, *others = args
        padded = _padded_with_border(node, layer, hold)
        return getattr(_aten, self.name).default, (padded, weight, bias, stride, [0] * self.trailing, *others)

    def call_of(self, layer: Any, read: Node, weight: Node, bias: Node | None) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments of a node that computes a layer."""
        packet, padding = getattr(_aten, self.name), layer.padding
        target = packet.padding if isinstance(padding, str) else packet.default
        padding = padding if isinstance(padding, str) else list(padding)
        return target, (read, weight, bias, list(layer.stride), padding, list(layer.dilation), layer.groups)


def sizes(value: Any, n: int) -> tuple[int, ...]:
    """Return a number for each of ``n`` axes: one stands for all."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * n if len(values) == 1 else values)


def _padded_with_border(node: Node, layer: Any, hold: Hold) -> Node:
    """Return the input padded with the border: with zeros, and then the border added where there is no input."""
    graph, read = node.graph, node.args[0]
    pads, dims = list(layer._reversed_padding_repeated_twice), len(layer.kernel_size)
    border = hold("border", layer.border.reshape(1, -1, *[1] * dims))
    with graph.inserting_before(node):
        one = _compute(graph, _aten.slice.Tensor, (_compute(graph, _aten.slice.Tensor, (read, 0, 0, 1)), 1, 0, 1))
        ones = _compute(graph, _aten.ones_like.default, (one,))
        inside = _compute(graph, _aten.constant_pad_nd.default, (ones, pads, 0.0))
        around = _compute(graph, _aten.mul.Tensor, (_compute(graph, _aten.rsub.Scalar, (inside, 1)), border))
        padded = _compute(graph, _aten.constant_pad_nd.default, (read, pads, 0.0))
        return _compute(graph, _aten.add.Tensor, (padded, around))


def _compute(graph: Graph, target: Any, args: tuple[Any, ...]) -> Node:
    """Add a node, with the value that it has without data if the others have theirs."""
    node = graph.call_function(target, args)
    values = [arg.meta.get("val") if isinstance(arg, Node) else arg for arg in args]
    mode = detect_fake_mode(values)
    if mode is not None:
        # what is computed here asks nothing of the shapes that the program does not ask already
        with mode, mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext():
            node.meta["val"] = target(*values)
    return node
