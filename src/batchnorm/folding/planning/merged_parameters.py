"""The parameters of a model while it is folded: what each has become so far, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.absorbers.operator import AbsorbingOperator, LayerParameters
from batchnorm.absorbers.table import absorber_of, linear_operator_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.errors import StateError
from batchnorm.folding.planning.absorbing_layer import AbsorbingLayer, find_absorbing_layer
from batchnorm.models.parameters import find_tensor
from batchnorm.nn.bordered import bordered
from batchnorm.travel.maps import Map
from batchnorm.travel.route import Route
from batchnorm.travel.rules import Absorbed

__all__ = ["Parameters"]


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
    absorbers: dict[str, AbsorbingLayer]
    borders: dict[str, Tensor] = field(default_factory=dict)
    with_borders: bool = False

    @classmethod
    def of(cls, model: Module, graph: Graph) -> Parameters:
        """Return them as they are."""
        return cls(model, graph, {}, {})

    def copy(self, *, with_borders: bool = False) -> Parameters:
        """Return them as they are now, to try something with."""
        state = dict(self.changed), dict(self.absorbers), dict(self.borders)
        return Parameters(self.model, self.graph, *state, with_borders)

    def named(self, name: str) -> Tensor | None:
        """Return a parameter or buffer as it is now, None for an empty place."""
        if name in self.changed:
            return self.changed[name]
        tensor = find_tensor(self.model, name)
        return None if tensor is None else tensor.detach().double()

    def absorbing(self, call: Call) -> AbsorbingOperator | None:
        """Return the row of the operator of a call, which says how it absorbs maps; None where it does not."""
        return absorber_of(call)

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

    def absorb(self, route: Route) -> list[AbsorbingLayer]:
        """Let the operators at the ends of a route absorb what is carried there; return their layers in order.

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
            absorbed = replace(first, bordered=any(end.bordered for _, end in group))
            with Refusal.at(*(call for call, _ in group)):
                absorbers.append(self._absorb_into(tuple(call for call, _ in group), absorbed))
        return sorted(absorbers, key=lambda layer: layer.calls[0].index)

    def absorb_beside(self, calls: Sequence[Call], map_: Map) -> AbsorbingLayer:
        """Let a linear operator add a map of what it reads to what it computes.

        Raises:
            Refusal: it cannot.
        """
        with Refusal.at(*calls):
            absorber = find_absorbing_layer(self.model, self.graph, tuple(calls), needs_bias=True)
        operator, now = linear_operator_of(calls[0]), self._now(absorber)
        assert operator is not None
        scale, shift = operator.channels_of(calls[0], Absorbed("output", map_))
        weight, bias = operator.absorb_beside(scale, shift, now.weight, now.bias)
        self.absorbers[absorber.name] = absorber
        self._set(absorber, LayerParameters(weight, bias, now.border))
        return absorber

    def _absorb_into(self, calls: tuple[Call, ...], absorbed: Absorbed) -> AbsorbingLayer:
        operator = absorber_of(calls[0])
        assert operator is not None
        absorber = find_absorbing_layer(self.model, self.graph, calls, needs_bias=operator.needs_bias(absorbed))
        known = self.absorbers.get(absorber.name)
        if absorber.bias is None and known is not None:  # it was given a bias before
            absorber = replace(absorber, bias=known.bias)
        self.absorbers[absorber.name] = absorber
        self._set(absorber, operator.merge(calls[0], absorbed, self._now(absorber), self))
        return absorber

    def _now(self, absorber: AbsorbingLayer) -> LayerParameters:
        weight = self.named(absorber.weight_name)
        assert weight is not None
        bias = None if absorber.bias_name is None else self.named(absorber.bias_name)
        return LayerParameters(weight.cpu(), None if bias is None else bias.cpu(), self.borders.get(absorber.name))

    def _set(self, absorber: AbsorbingLayer, new: LayerParameters) -> None:
        self.changed[absorber.weight_name] = new.weight
        if absorber.bias_name is not None and new.bias is not None:
            self.changed[absorber.bias_name] = new.bias
        if new.border is not None and new.border is not self.borders.get(absorber.name):
            try:
                bordered(self.model.get_submodule(absorber.name), new.border)
            except StateError as error:
                raise Refusal(f"{absorber.name or 'The model'}: {error}") from error
            self.borders[absorber.name] = new.border
