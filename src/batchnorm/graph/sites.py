"""Where a norm can be absorbed: it and the linear operators whose outputs it normalizes, or why it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.jit import ScriptModule
from torch.nn import Module, Parameter

from batchnorm.graph.affine import LINEAR_OPERATORS, LinearOperator
from batchnorm.graph.dataflow import Call, Graph, Value
from batchnorm.graph.families import DROPOUTS, PASSING, family
from batchnorm.graph.norms import NormState, NormUse, check_norm
from batchnorm.graph.refusal import Refusal

__all__ = ["Host", "Site", "describe_source", "find_site"]


@dataclass(frozen=True, eq=False)
class Host:
    """A module that absorbs a norm.

    Attributes:
        name: its qualified name.
        operator: what its forward calls.
        weight: the name, in the module, of its weight.
        bias: that of its bias; the parameter may be None until now.
        groups: number of groups of a convolution.
        calls: its calls; all of them, and each feeds the norm.
    """

    name: str
    operator: LinearOperator
    weight: str
    bias: str
    groups: int
    calls: tuple[Call, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """A norm that can be folded. It has several hosts when one norm module follows several linear operators.

    Attributes:
        norm: what a report calls it.
        module: the qualified name of its module.
        state: the tensors that it applies.
        calls: its calls.
        hosts: the modules that absorb it.
    """

    norm: str
    module: str
    state: NormState
    calls: tuple[Call, ...]
    hosts: tuple[Host, ...]

    @property
    def into(self) -> str:
        """The names of the hosts."""
        return ", ".join(host.name for host in self.hosts)

    @property
    def kind(self) -> str:
        """What the hosts are."""
        return ", ".join(dict.fromkeys(host.operator.kind for host in self.hosts))


def find_site(model: Module, graph: Graph, use: NormUse) -> Site:
    """Return where the norm can be folded.

    Raises:
        Refusal: it cannot; says why.
    """
    state = check_norm(graph, use)
    by_weight: dict[Value, list[Call]] = {}
    for call in use.calls:
        path = _path_to_source(call)
        source = path[-1].producer
        assert source is not None
        _require_axis(source, path[0])
        _require_exclusive(graph, path, call)
        by_weight.setdefault(source.args["weight"], []).append(source)
    hosts = tuple(_host(model, graph, tuple(calls)) for calls in by_weight.values())
    return Site(use.name, use.calls[0].module, state, use.calls, hosts)


def describe_source(graph: Graph, use: NormUse) -> str | None:
    """Return the module whose linear operator the norm's first call follows, for the eye of a reader."""
    try:
        source = _path_to_source(use.calls[0])[-1].producer
    except Refusal:
        return None
    assert source is not None
    weight = source.args["weight"]
    return weight.names[0].rpartition(".")[0] or None if weight.names else source.module or None


# -- the way from the norm back to a linear operator -----------------------------------------------------------------


def _path_to_source(norm: Call) -> list[Value]:
    """Return the values between a linear operator and the norm, the norm's input first."""
    value = norm.args.get("input")
    if not isinstance(value, Value):
        raise Refusal("Its input is not a tensor that the pass saw.")
    path = [value]
    while True:
        producer = path[-1].producer
        if producer is None:
            what = {"input": "an input of the model", "state": "a parameter or buffer"}.get(path[-1].kind, "a constant")
            raise Refusal(f"It reads {what}, which no linear operator precedes.")
        if producer.op.namespace == "aten" and producer.name in LINEAR_OPERATORS:
            return path
        if not _passes_through(producer):
            where = f" in {producer.module}" if producer.module else ""
            raise Refusal(f"It reads the output of {producer.name}{where}, which is no linear operator.")
        path.append(producer.args["self"] if "self" in producer.args else producer.args["input"])


def _passes_through(call: Call) -> bool:
    """Whether the call returns its first argument with the same values, shape and dtype."""
    if call.op.namespace != "aten" or len(call.outputs) != 1:
        return False
    if call.name in _COPIES:
        (read,) = call.tensor_args()
        return read.dtype == call.output.dtype
    if family(call) in DROPOUTS:
        return not call.args["train"] or call.args["p"] == 0
    return False


_COPIES = PASSING | {"to", "_to_copy"}


def _require_axis(source: Call, value: Value) -> None:
    operator = LINEAR_OPERATORS[source.name]
    axis = operator.channel_axis(len(value.shape))
    if axis != 1:
        raise Refusal(
            f"It normalizes axis 1 of a tensor of shape {value.shape}, while the output channels of {source.name} are "
            f"on axis {axis}."
        )


def _require_exclusive(graph: Graph, path: list[Value], norm: Call) -> None:
    reader = norm
    for value in path:
        others = graph.other_readers(value, reader)
        if others:
            source = path[-1].producer
            assert source is not None
            raise Refusal(f"The output of {source.name} is also read by {_listed(others)}.")
        assert value.producer is not None
        reader = value.producer


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


# -- the module that is to absorb the norm ---------------------------------------------------------------------------


def _host(model: Module, graph: Graph, calls: tuple[Call, ...]) -> Host:
    call = calls[0]
    weight = call.args["weight"]
    _require_real(weight, call)
    name, slot = _parameter_slot(model, call, "weight")
    module = model.get_submodule(name)
    _require_plain_module(module, name)
    _require_run_by_itself(model, calls, module, name)
    _require_no_other_calls(graph, calls, weight, name)
    bias = _bias_slot(model, graph, calls, module, name)
    groups = call.args.get("groups", 1)
    if any(c.name != call.name or c.args.get("groups", 1) != groups for c in calls):
        raise Refusal(f"The calls of {name} are not all the same operator.")
    return Host(name, LINEAR_OPERATORS[call.name], slot, bias, int(groups), calls)


def _require_real(weight: Value, call: Call) -> None:
    if weight.dtype not in {torch.float64, torch.float32, torch.float16, torch.bfloat16}:
        raise Refusal(f"The weight of {call.name} is of type {weight.dtype}.")


def _parameter_slot(model: Module, call: Call, key: str) -> tuple[str, str]:
    """Return the module that holds an argument as an ordinary parameter of its own, and its name there."""
    value = call.args[key]
    if value.kind != "state":
        by = f"computed by {value.producer.name}" if value.producer is not None else "not a parameter of the model"
        raise Refusal(f"The {key} of {call.name} is {by}.")
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
        raise Refusal(f"Its {key} {value.names[0]} is shared with {_listed(strangers)}.")
    return name, slot


def _require_plain_module(module: Module, name: str) -> None:
    if isinstance(module, ScriptModule):
        raise Refusal(f"{name} is part of a scripted module, which cannot be edited.")
    if hasattr(module, "parametrizations"):
        raise Refusal(f"{name} is parametrized: its weight is computed anew from others.")
    hooks = {
        "forward": (module._forward_hooks, module._forward_pre_hooks),
        "backward": (module._backward_hooks, module._backward_pre_hooks),
    }
    for kind, registries in hooks.items():
        if any(registries):
            raise Refusal(f"{name or 'The module'} has a {kind} hook, which would meet other values.")


def _require_run_by_itself(model: Module, calls: tuple[Call, ...], module: Module, name: str) -> None:
    for call in calls:
        if model.get_submodule(call.module) is not module:
            raise Refusal(
                f"The weight of {name or 'the model'} is used in {call.module or 'the model'}, outside its own forward."
            )


def _require_no_other_calls(graph: Graph, calls: tuple[Call, ...], tensor: Value, name: str) -> None:
    """The parameter may be read by these calls, each of which feeds this norm, and by nobody else."""
    others = [c for c in graph.readers(tensor) if c not in calls]
    same = [c for c in others if c.op == calls[0].op]
    if same:
        raise Refusal(
            f"{name} runs {len(calls) + len(same)} times, and only {len(calls)} of its outputs "
            f"{'goes' if len(calls) == 1 else 'go'} through this norm."
        )
    if others:
        raise Refusal(f"{tensor.names[0]} is also read by {others[0].name} in {others[0].module or 'the model'}.")
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
