"""Layers with weights of their own: tied ones copied, computed ones stored, so that each can absorb something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import Module, Parameter
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.dataflow.graph import Call, Graph, ModuleCall, Value
from batchnorm.dataflow.refusal import Refusal
from batchnorm.models.parameters import find_tensor, is_within, put_parameter, qualified

__all__ = ["ComputedWeights", "ties", "untie"]


def ties(model: Module) -> dict[str, str]:
    """Return the parameters that a module shares with another, or has twice, by name: the name of the first place."""
    first: dict[int, tuple[str, int, str]] = {}
    found = {}
    for name, module in model.named_modules():
        for slot, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = qualified(name, slot)
            known = first.setdefault(id(parameter), (full, id(module), slot))
            if known[1:] != (id(module), slot):
                found[full] = known[0]
    return found


def untie(model: Module, names: Iterable[str] | None = None) -> None:
    """Give modules copies of parameters that others have too: of all, or of those of these names.

    The model computes what it did.
    """
    for name in ties(model) if names is None else names:
        module, old = model.get_submodule(name.rpartition(".")[0]), find_tensor(model, name)
        if type(old) is Parameter and not isinstance(module, ScriptModule):
            put_parameter(model, name, Parameter(old.detach().clone(), requires_grad=old.requires_grad))


@dataclass(eq=False)
class ComputedWeights:
    """Looks, during a pass, at the weights that layers compute of their parameters: normalized ones, say."""

    _seen: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def observe(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Keep the weight and bias of a linear operator, if it has another weight than a parameter."""
        weight = call.args.get("weight")
        if linear_operator_of(call) is not None and isinstance(weight, Value) and weight.kind == "computed":
            names = [argument.name for argument in call.op._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._seen[call.index] = {
                key: given[key].detach().clone() for key in ("weight", "bias") if given.get(key) is not None
            }

    def layers(self, graph: Graph) -> dict[str, Module]:
        """Return, for each module that does nothing but to compute a weight and use it, the layer with that stored."""
        found: dict[str, Module] = {}
        by_module: dict[Module, list[ModuleCall]] = {}  # the model and one that only wraps it have the same name
        for run in graph.module_calls:
            by_module.setdefault(run.module, []).append(run)
        for module, runs in by_module.items():
            calls = [call for run in runs for call in run.calls if call.index in self._seen]
            if len(calls) == len(runs) and all(map(_only_computes, runs, calls)) and self._same(calls):
                layer = self._layer(calls[0], module)
                if layer is not None:
                    found[runs[0].name] = layer
        # of a module and what it wraps, the inner one: the names of its parameters stay
        return {name: layer for name, layer in found.items() if not any(is_within(other, name) for other in found)}

    def _same(self, calls: Sequence[Call]) -> bool:
        """Whether every run used the same weight."""
        first = self._seen[calls[0].index]
        others = [self._seen[call.index] for call in calls[1:]]
        return all(o.keys() == first.keys() and all(torch.equal(o[k], first[k]) for k in o) for o in others)

    def _layer(self, call: Call, module: Module) -> Module | None:
        operator = linear_operator_of(call)
        assert operator is not None
        try:
            layer = operator.layer({**call.args, "bias": None, **self._seen[call.index]})
        except Refusal:
            return None
        trained = any(parameter.requires_grad for parameter in module.parameters())
        return layer.train(module.training).requires_grad_(trained)


def _only_computes(run: ModuleCall, call: Call) -> bool:
    """Whether a run takes one tensor, computes a weight of its state alone, and returns what the operator gives."""
    if not run.plain or run.inputs != (call.args["input"],) or run.outputs != (call.output,):
        return False
    if any(map(_has_hooks, run.module.modules())):
        return False
    own: set[Value] = set()
    for other in run.calls:
        if other is call:
            continue
        read = list(other.tensor_args())
        random = torch.Tag.nondeterministic_seeded in other.op.tags
        if random or any(value.kind != "state" and value not in own for value in read):
            return False
        if any(value.kind == "state" and other.writes_into(value) for value in read):
            return False
        own.update(other.outputs)
    used = [call.args["weight"], call.args.get("bias")]
    return all(value is None or value in own or value.kind == "state" for value in used)


def _has_hooks(module: Module) -> bool:
    """Whether a hook watches the module; hooks that compute its weight before each run do not."""
    weights = (WeightNorm, SpectralNorm)
    watching = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, weights)]
    registries = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return isinstance(module, ScriptModule) or bool(watching) or any(registries)
