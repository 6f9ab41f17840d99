"""The modules that are to absorb a map: their parameters are theirs alone, and used as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.jit import ScriptModule
from torch.nn import Module, Parameter

from batchnorm.absorbers.operator import AbsorbingOperator
from batchnorm.absorbers.table import absorber_of
from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.refusal import Refusal, listed
from batchnorm.models.hooks import hooks_of
from batchnorm.models.parameters import qualified

__all__ = ["AbsorbingLayer", "find_absorbing_layer"]


@dataclass(frozen=True, eq=False)
class AbsorbingLayer:
    """A module that absorbs a map.

    Attributes:
        name: its qualified name.
        operator: what it computes.
        weight: the name, in the module, of its weight.
        bias: that of its bias, which may be None until now; None where no bias is needed.
        groups: number of groups of a convolution.
        calls: its calls; all of them.
    """

    name: str
    operator: AbsorbingOperator
    weight: str
    bias: str | None
    groups: int
    calls: tuple[Call, ...]

    @property
    def weight_name(self) -> str:
        """The qualified name of its weight."""
        return qualified(self.name, self.weight)

    @property
    def bias_name(self) -> str | None:
        """The qualified name of its bias."""
        return None if self.bias is None else qualified(self.name, self.bias)


def find_absorbing_layer(model: Module, graph: Graph, calls: tuple[Call, ...], *, needs_bias: bool) -> AbsorbingLayer:
    """Return the module whose parameters the calls read, all of them.

    Raises:
        Refusal: it cannot be given other parameters; says why.
    """
    call = calls[0]
    weight = call.args["weight"]
    _require_real(weight, call)
    name, slot = _parameter_slot(model, call, "weight")
    module = model.get_submodule(name)
    _require_plain_module(module, name)
    _require_run_by_itself(model, calls, module, name)
    _require_no_other_calls(graph, calls, weight, name)
    given = call.args.get("bias")
    bias = _bias_slot(model, graph, calls, module, name) if needs_bias or given is not None else None
    groups = call.args.get("groups", 1)
    if any(c.name != call.name or c.args.get("groups", 1) != groups for c in calls):
        raise Refusal(f"The calls of {name} are not all the same operator.")
    operator = absorber_of(call)
    assert operator is not None
    return AbsorbingLayer(name, operator, slot, bias, int(groups), calls)


def _require_real(weight: Value, call: Call) -> None:
    if weight.dtype not in {torch.float64, torch.float32, torch.float16, torch.bfloat16}:
        raise Refusal(f"The weight of {call.name} is of type {weight.dtype}.")


def _parameter_slot(model: Module, call: Call, key: str) -> tuple[str, str]:
    """Return the module that holds an argument as an ordinary parameter of its own, and its name there."""
    value = call.args[key]
    if value.kind != "state":
        by = f"computed by {value.producer.name}" if value.producer is not None else "not a parameter of the model"
        cast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))  # below what a pass shows
        raise Refusal(f"The {key} of {call.name} is {by}{', but a cast of torch.autocast; fold outside of it' * cast}.")
    name, _, slot = value.names[0].rpartition(".")
    module = model.get_submodule(name)
    if type(module._parameters.get(slot)) is not Parameter:
        raise Refusal(f"The {key} of {call.name}, {value.names[0]}, is not an ordinary parameter.")
    strangers = [
        other
        for other in value.names
        if (model.get_submodule(other.rpartition(".")[0]) is not module) or other.rpartition(".")[2] != slot
    ]
    if strangers:
        raise Refusal(f"Its {key} {value.names[0]} is shared with {listed(strangers)}.")
    return name, slot


def _require_plain_module(module: Module, name: str) -> None:
    if isinstance(module, ScriptModule):
        raise Refusal(f"{name} is part of a scripted module, which cannot be edited.")
    if hasattr(module, "parametrizations"):
        raise Refusal(f"{name} is parametrized: its weight is computed anew from others.")
    for kind in hooks_of(module):
        raise Refusal(f"{name or 'The module'} has a {kind} hook, which would meet other values.")


def _require_run_by_itself(model: Module, calls: tuple[Call, ...], module: Module, name: str) -> None:
    for call in calls:
        if model.get_submodule(call.module) is not module:
            raise Refusal(
                f"The weight of {name or 'the model'} is used in {call.module or 'the model'}, outside its own forward."
            )


def _require_no_other_calls(graph: Graph, calls: tuple[Call, ...], tensor: Value, name: str) -> None:
    """The parameter may be read by these calls, each of which feeds this norm, and by nothing else."""
    others = [c for c in graph.readers(tensor) if c not in calls]
    same = [c for c in others if c.op == calls[0].op]
    if same:
        through = sum(call.run == same[0].run for call in calls)  # as it is in one of several runs
        total = through + sum(call.run == same[0].run for call in same)
        if not through:
            raise Refusal(f"{name} runs, and its output does not go through this norm.", calls=same)
        raise Refusal(
            f"{name} runs {total} times, and only {through} of its outputs {'goes' if through == 1 else 'go'} through "
            "this norm.",
            calls=same,
        )
    if others:
        reader = others[0]
        raise Refusal(
            f"{tensor.names[0]} is also read by {reader.name} in {reader.module or 'the model'}.", calls=others
        )
    if graph.is_output(tensor):
        raise Refusal(f"{tensor.names[0]} is also an output of the model.")


def _bias_slot(model: Module, graph: Graph, calls: tuple[Call, ...], module: Module, name: str) -> str:
    """Return the name of the module's bias, which may still be None."""
    value = calls[0].args["bias"]
    if any(call.args["bias"] is not value for call in calls):
        raise Refusal(f"The calls of {name} do not all use the same bias.")
    if value is None:
        if "bias" not in module._parameters or module._parameters["bias"] is not None:
            raise Refusal(f"{name} has no bias, and no place for one.")
        return "bias"
    owner, slot = _parameter_slot(model, calls[0], "bias")
    if model.get_submodule(owner) is not module:
        raise Refusal(f"The bias of {name} belongs to {owner or 'the model'}.")
    _require_no_other_calls(graph, calls, value, name)
    return slot
