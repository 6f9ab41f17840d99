"""The parameters of a model while it is folded: what each has become so far, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.linear_operators import LINEAR_OPERATORS, Affine
from batchnorm.dataflow.refusal import Refusal
from batchnorm.errors import StateError
from batchnorm.folding.planning.absorbers import Absorber, find_absorber
from batchnorm.nn.bordered import bordered
from batchnorm.travel.maps import Map
from batchnorm.travel.route import Route
from batchnorm.travel.rules import Absorbed, Side

__all__ = ["Parameters", "find_tensor", "put_parameter"]


def find_tensor(model: Module, name: str | None) -> Tensor | None:
    """Return the parameter or buffer of that qualified name, None for no name or an empty place."""
    if name is None:
        return None
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]


def put_parameter(model: Module, name: str, parameter: Parameter | None) -> None:
    """Put a parameter, or an empty place for one, under a qualified name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = parameter


@dataclass(eq=False)
class Parameters:
    """What the parameters are, and become.

    Attributes:
        changed: new values of parameters, by their qualified name; float64.
        absorbers: those that absorbed something, by name, in the order in which they first did.
        borders: what convolutions pad with instead of zeros, by their name; float64, (C,).
        with_borders: whether they may.
    """

    model: Module
    graph: Graph
    changed: dict[str, Tensor]
    absorbers: dict[str, Absorber]
    borders: dict[str, Tensor] = field(default_factory=dict)
    with_borders: bool = False

    @classmethod
    def of(cls, model: Module, graph: Graph) -> Parameters:
        """Return them as they are."""
        return cls(model, graph, {}, {})

    def copy(self) -> Parameters:
        """Return them as they are now, to try something with."""
        return replace(self, changed=dict(self.changed), absorbers=dict(self.absorbers), borders=dict(self.borders))

    def named(self, name: str) -> Tensor | None:
        """Return a parameter or buffer as it is now, None for an empty place."""
        if name in self.changed:
            return self.changed[name]
        tensor = find_tensor(self.model, name)
        return None if tensor is None else tensor.detach().double()

    def tensor(self, value: Value) -> Tensor:
        """Return a parameter or buffer as it is now, in float64 and on the CPU.

        Raises:
            Refusal: it is none, or has no finite values.
        """
        if value.kind != "state" or not value.names:
            raise Refusal("It meets a tensor that is no parameter or buffer.")
        tensor = self.named(value.names[0])
        assert tensor is not None
        if tensor.is_meta or not bool(torch.isfinite(tensor).all()):
            raise Refusal(f"{value.names[0]} is not finite.")
        return tensor.cpu()

    def absorb(self, route: Route) -> list[Absorber]:
        """Let the operators at the ends of a way absorb what is carried there; returns who they are.

        Raises:
            Refusal: one of them cannot.
        """
        by_weight: dict[Value, list[tuple[Call, Absorbed]]] = {}
        for call, absorbed in route.absorbed:
            weight = call.args["weight"]
            if not isinstance(weight, Value):
                raise Refusal(f"{call.name} in {call.module or 'the model'} has no weight that could absorb it.")
            by_weight.setdefault(weight, []).append((call, absorbed))
        absorbers = []
        for group in by_weight.values():
            group.sort(key=lambda end: end[0].index)
            first = group[0][1]
            others = [call for call, o in group if o.side != first.side or not o.map.same_as(first.map)]
            if others:
                module = group[0][0].module or "the model"
                raise Refusal(f"The calls of {module} would have to absorb different maps.", calls=others)
            with Refusal.at(*(call for call, _ in group)):
                absorbers.append(self._absorb_into(tuple(call for call, _ in group), first.side, first.map))
                if any(absorbed.bordered for _, absorbed in group):
                    self._pad_with(absorbers[-1], group[0][0], first.map)
        return absorbers

    def _pad_with(self, absorber: Absorber, call: Call, map_: Map) -> None:
        """Let a convolution pad with what the map makes of it what was padded with before."""
        try:
            bordered(self.model.get_submodule(absorber.name), torch.zeros(call.args["input"].shape[1]))
        except StateError as error:
            raise Refusal(f"{absorber.name or 'The model'}: {error}") from error
        scale, shift = map_.along(1, call.args["input"].shape[1])
        before = self.borders.get(absorber.name, torch.zeros_like(shift))
        self.borders[absorber.name] = (before - shift) / scale

    def absorb_beside(self, calls: Sequence[Call], map_: Map) -> Absorber:
        """Let a linear operator add a map of what it reads to what it computes.

        Raises:
            Refusal: it cannot.
        """
        with Refusal.at(*calls):
            absorber = find_absorber(self.model, self.graph, tuple(calls), needs_bias=True)
        shape = calls[0].output.shape
        operator = LINEAR_OPERATORS[calls[0].name]
        axis = operator.channel_axis(len(shape))
        affine = Affine(*map_.along(axis, shape[axis]))
        merged, bias = operator.absorb_beside(affine, self._weight(absorber), self._bias(absorber))
        assert absorber.bias_name is not None
        self.absorbers[absorber.name] = absorber
        self.changed |= {absorber.weight_name: merged, absorber.bias_name: bias}
        return absorber

    def _absorb_into(self, calls: Sequence[Call], side: Side, map_: Map) -> Absorber:
        call = calls[0]
        # a norm before which it stands gives it a bias in any case: the names in a state dict hang on no values
        needs_bias = call.name != "embedding" and (side == "output" or not map_.only_scales)
        absorber = find_absorber(self.model, self.graph, tuple(calls), needs_bias=needs_bias)
        known = self.absorbers.get(absorber.name)
        if absorber.bias is None and known is not None:  # it was given a bias before
            absorber = replace(absorber, bias=known.bias)
        self.absorbers[absorber.name] = absorber
        if call.name == "batch_norm":
            self._into_norm(absorber, call, side, map_)
        elif call.name == "embedding":
            scale, shift = map_.along(-1, call.output.shape[-1])
            weight = self._weight(absorber)
            self.changed[absorber.weight_name] = scale * weight + shift
        else:
            self._into_linear(absorber, call, side, map_)
        return absorber

    def _into_linear(self, absorber: Absorber, call: Call, side: Side, map_: Map) -> None:
        operator = LINEAR_OPERATORS[call.name]
        shape = call.output.shape if side == "output" else call.args["input"].shape
        axis = operator.channel_axis(len(shape))
        affine = Affine(*map_.along(axis, shape[axis]))
        weight, bias = self._weight(absorber), self._bias(absorber)
        absorb = operator.absorb if side == "output" else operator.absorb_inner
        merged, new_bias = absorb(affine, weight, bias, absorber.groups)
        self.changed[absorber.weight_name] = merged
        if absorber.bias_name is not None and new_bias is not None:
            self.changed[absorber.bias_name] = new_bias

    def _into_norm(self, absorber: Absorber, call: Call, side: Side, map_: Map) -> None:
        axis, shape = 1, call.output.shape
        scale, shift = map_.along(axis, shape[axis])
        gamma, beta = self._weight(absorber), self._bias(absorber)
        assert beta is not None
        assert absorber.bias_name is not None
        mean, var = (self.tensor(call.args[key]) for key in ("running_mean", "running_var"))
        self.changed[absorber.weight_name] = scale * gamma
        if side == "output":
            self.changed[absorber.bias_name] = scale * beta + shift
        else:
            # γ(s x + t − μ)/σ + β, with γ s in place of γ
            deviation = torch.sqrt(var + call.args["eps"])
            self.changed[absorber.bias_name] = beta + gamma * (shift - mean + scale * mean) / deviation

    def _weight(self, absorber: Absorber) -> Tensor:
        weight = self.named(absorber.weight_name)
        assert weight is not None
        return weight.cpu()

    def _bias(self, absorber: Absorber) -> Tensor | None:
        bias = None if absorber.bias_name is None else self.named(absorber.bias_name)
        return None if bias is None else bias.cpu()
