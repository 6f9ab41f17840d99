"""What one row of the table of absorbing operators says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Module, Parameter

from batchnorm.dataflow.graph import Call, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.nn.operators import named_arguments
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed, Knowledge

__all__ = ["AbsorbingOperator", "Constant", "Hold", "LayerParameters"]

Constant: TypeAlias = Callable[[object], "Tensor | None"]
"""Gives the tensor that a program's node holds in every run; None where it does not."""

Hold: TypeAlias = Callable[[str, Tensor], Node]
"""Gives the node that holds a parameter or buffer, given its name in the layer and its value."""


@dataclass(frozen=True, eq=False)
class LayerParameters:
    """What a layer computes with, in float64.

    Attributes:
        weight: its weight.
        bias: its bias, if it has one.
        border: what it pads with instead of zeros, (C,); None for zeros.
    """

    weight: Tensor
    bias: Tensor | None = None
    border: Tensor | None = None


class AbsorbingOperator(ABC):
    """An operator that is affine in what it reads, with a weight of its own, so that it can compute a map itself.

    Attributes:
        name: its name within its namespace, for example ``"conv2d"``.
        namespace: where torch has it.
        kind: what a result calls it.
        noun: what a sentence calls it.
        reads: the name of its argument that is no parameter.
        multiplies: whether what it reads is multiplied with its weight.
        forms: names of the operators as which programs write it.
        functions: functions of torch that programs call for it, each with the operator that takes the same arguments.
    """

    namespace: ClassVar[str] = "aten"
    name: str
    kind: ClassVar[str]
    reads: ClassVar[str] = "input"
    multiplies: ClassVar[bool] = True
    forms: Collection[str]
    functions: Mapping[Any, Any] = MappingProxyType({})

    @property
    def noun(self) -> str:
        """What a sentence calls it."""
        return self.kind

    @abstractmethod
    def channel_axis(self, dim: int) -> int:
        """Return the axis of the channels in an output of ``dim`` axes; in an input of as many it is the same."""

    # -- which maps it absorbs -----------------------------------------------------------------------------------------

    def backward(self, call: Call, wanted: Sequence[Map], known: Knowledge) -> Absorbed:
        """Absorb a map of the output.

        Raises:
            Refusal: it varies along another axis than that of the channels.
        """
        self._require_along_channels(wanted[0], call, call.output, "output")
        return Absorbed("output", wanted[0])

    def forward(self, call: Call, given: Mapping[Value, Map], known: Knowledge) -> Absorbed:
        """Absorb a map of the input.

        Raises:
            Refusal: it varies along another axis than that of the channels, or maps a parameter.
        """
        value = call.args[self.reads]
        if set(given) != {value}:
            raise Refusal(f"{call.name} reads it as a parameter.")
        self._require_along_channels(given[value], call, value, "input")
        return Absorbed("input", given[value])

    def _require_along_channels(self, map_: Map, call: Call, value: Value, side: str) -> None:
        axis = self.channel_axis(len(value.shape))
        for other in range(len(value.shape)):
            if other != axis and max(map_.scale.shape[other], map_.shift.shape[other]) > 1:
                raise Refusal(
                    f"It normalizes axis {other} of a tensor of shape {tuple(value.shape)}, while the {side} channels "
                    f"of {call.name} are on axis {axis}."
                )

    # -- with which parameters it does ---------------------------------------------------------------------------------

    def needs_bias(self, absorbed: Absorbed) -> bool:
        """Whether a layer that absorbs this must have a bias.

        Behind a layer it does in any case: the names in a state dict must not depend on values.
        """
        return absorbed.side == "output" or not absorbed.map.only_scales

    @abstractmethod
    def merge(self, call: Call, absorbed: Absorbed, now: LayerParameters, known: Knowledge) -> LayerParameters:
        """Return the parameters with which the operator computes a map, too, that it absorbed."""

    def channels_of(self, call: Call, absorbed: Absorbed) -> tuple[Tensor, Tensor]:
        """Return scale and shift of a map that was absorbed, one number a channel.

        Raises:
            Refusal: it varies along another axis.
        """
        shape = call.output.shape if absorbed.side == "output" else call.args[self.reads].shape
        axis = self.channel_axis(len(shape))
        return absorbed.map.along(axis, shape[axis])

    @abstractmethod
    def by_channel(self, weight: Tensor, groups: int) -> Tensor:
        """Return a weight as (output channels, elements)."""

    # -- what it costs -------------------------------------------------------------------------------------------------

    def multiply_adds(self, call: Call) -> int:
        """Return how often a call multiplies an element of its weight."""
        return 0

    # -- its layer -----------------------------------------------------------------------------------------------------

    def layer(self, args: Mapping[str, Any]) -> Module:
        """Return the layer that computes what a call does, with parameters that are copies of the call's own.

        Args:
            args: the arguments by their names in the schema; the tensors among them except the input, which is not
                read.

        Raises:
            Refusal: no layer computes this.
        """
        layer = self.settings(args)
        for key in ("weight", "bias"):
            tensor = args.get(key)
            layer.register_parameter(key, None if tensor is None else _parameter(tensor))
        return layer.eval()

    @abstractmethod
    def settings(self, args: Mapping[str, Any]) -> Module:
        """Return the layer with its settings, whose weight and bias are yet to be given.

        Raises:
            Refusal: no layer has these settings.
        """

    # -- in programs ---------------------------------------------------------------------------------------------------

    def arguments(
        self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], constant: Constant
    ) -> Mapping[str, Any] | None:
        """Return the operator's arguments by name, if that is what a node of a program computes; else None.

        Args:
            target: what the node calls.
            args: with which arguments.
            kwargs: and which by name.
            constant: gives the tensors of nodes.
        """
        target = self.functions.get(target, target)
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != self.namespace:
            return None
        form = target._schema.name.split("::")[1]
        return self.in_own_form(form, named_arguments(target, args, kwargs), constant) if form in self.forms else None

    def in_own_form(self, form: str, args: Mapping[str, Any], constant: Constant) -> Mapping[str, Any] | None:
        """Return the arguments of one of the forms as those of the operator; None where it computes something else."""
        return args

    @abstractmethod
    def written(self, layer: Any, node: Node, hold: Hold) -> tuple[Any, tuple[Any, ...]]:
        """Return the target and the arguments with which a node of a program computes a layer.

        Args:
            layer: its settings and parameters.
            node: reads, as its first argument, what the layer reads.
            hold: gives the nodes of parameters and buffers.
        """


def _parameter(tensor: Tensor) -> Parameter:
    trained = tensor.is_floating_point() and isinstance(tensor, Parameter) and tensor.requires_grad
    return Parameter(tensor.detach().clone(), requires_grad=trained)
