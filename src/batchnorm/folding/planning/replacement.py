"""What stays of a norm's module when its norm is gone: nothing, or the activation that it also runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Identity, Module, Sequential

from batchnorm.dataflow.graph import Call, Graph, ModuleCall, Value
from batchnorm.dataflow.operator_kinds import family
from batchnorm.dataflow.refusal import Refusal
from batchnorm.nn.scale_shift import ScaleShift

__all__ = ["Replacement", "find_replacement"]

_ACTIVATIONS: Mapping[str, Callable[[Mapping[str, Any]], Module]] = {
    "elu": lambda args: nn.ELU(args["alpha"]),
    "gelu": lambda args: nn.GELU(args["approximate"]),
    "hardsigmoid": lambda args: nn.Hardsigmoid(),
    "hardswish": lambda args: nn.Hardswish(),
    "hardtanh": lambda args: nn.Hardtanh(args["min_val"], args["max_val"]),
    "leaky_relu": lambda args: nn.LeakyReLU(args["negative_slope"]),
    "mish": lambda args: nn.Mish(),
    "relu": lambda args: nn.ReLU(),
    "relu6": lambda args: nn.ReLU6(),
    "sigmoid": lambda args: nn.Sigmoid(),
    "silu": lambda args: nn.SiLU(),
    "tanh": lambda args: nn.Tanh(),
}
"""Activations that a norm's own forward may call as functions, as modules; never in place."""


@dataclass(frozen=True)
class Replacement:
    """What a norm's module is replaced with.

    Attributes:
        parts: names of the norm's submodules that go on running, activations, or layers, in their order.
    """

    parts: tuple[str | Module, ...] = ()

    def build(self, norm: Module) -> Module:
        """Return the module that takes the norm's place."""
        if not self.parts:
            return Identity().train(norm.training)
        parts = [norm.get_submodule(part) if isinstance(part, str) else part for part in self.parts]
        if isinstance(parts[0], ScaleShift) and len(parts) == 2:
            first: ScaleShift = parts[0]
            whole: Module = ScaleShift(first.weight, first.bias, parts[1], first.fused)
        else:
            whole = parts[0] if len(parts) == 1 else Sequential(*parts)
        whole.training = norm.training
        return whole


def find_replacement(graph: Graph, owner: Module, name: str, calls: tuple[Call, ...]) -> Replacement:
    """Return what has to stay of a norm's module: the same in all its runs.

    Args:
        graph: the dataflow.
        owner: the module.
        name: its qualified name.
        calls: the norm's calls.

    Raises:
        Refusal: it does something else than to normalize one tensor, and to run submodules or activations on that.
    """
    runs = [run for run in graph.module_calls if run.module is owner]
    found: list[tuple[str | Module, ...]] = []
    for call in calls:
        run = next((run for run in runs if call in run.calls), None)
        if run is None:
            where = call.module or "the model's own forward"
            raise Refusal(f"It is called as a function in {where}, not by running its module.")
        found.append(_parts(graph, run, call, name))
    if len(runs) != len(calls):
        raise Refusal("Some runs of its module do not normalize.")
    if any(_signature(parts) != _signature(found[0]) for parts in found[1:]):
        raise Refusal("Its module does not do the same in all its runs.")
    return Replacement(found[0])


def _signature(parts: tuple[str | Module, ...]) -> list[str]:
    return [part if isinstance(part, str) else repr(part) for part in parts]


def _parts(graph: Graph, run: ModuleCall, norm: Call, name: str) -> tuple[str | Module, ...]:
    """Return what follows the norm within its module, along the one tensor that goes through."""
    if not (run.plain and run.inputs == (norm.args["input"],)):
        _refuse_others(run, norm)
        raise Refusal("Its module does more than take one tensor and return it normalized.")
    parts: list[str | Module] = []
    value, done = norm.output, {norm}
    children = _children(graph, run, name)
    while run.outputs != (value,):
        child = next((c for c in children if c.plain and c.inputs == (value,) and len(c.outputs) == 1), None)
        if child is not None:
            parts.append(child.name.removeprefix(f"{name}."))
            done |= set(child.calls)
            children.remove(child)
            value = child.outputs[0]
            continue
        call = next((c for c in run.calls if c not in done and _is_activation_of(c, value)), None)
        if call is None:
            _refuse_others(run, norm)
            raise Refusal("Its module does more than take one tensor and return it normalized.")
        parts.append(_ACTIVATIONS[family(call)](call.args))
        done.add(call)
        value = call.output
    # submodules that pass their input on come after the last operator, or between others
    parts += [c.name.removeprefix(f"{name}.") for c in children if c.calls == [] and c.inputs == c.outputs == (value,)]
    if not done.issuperset(run.calls):
        _refuse_others(run, norm)
    return tuple(parts)


def _children(graph: Graph, run: ModuleCall, name: str) -> list[ModuleCall]:
    """Return the runs of submodules, right within this one."""
    prefix = f"{name}."
    named = [
        other
        for other in graph.module_calls
        if other.run == run.run and other.name.startswith(prefix) and "." not in other.name.removeprefix(prefix)
    ]
    if not named:
        return []
    return [other for other in named if other is not run and set(run.calls).issuperset(other.calls)]


def _is_activation_of(call: Call, value: Value) -> bool:
    read = list(call.tensor_args())
    return call.op.namespace == "aten" and family(call) in _ACTIVATIONS and read == [value]


def _refuse_others(run: ModuleCall, norm: Call) -> None:
    others = [c.name for c in run.calls if c is not norm]
    if others:
        listed = ", ".join(dict.fromkeys(others))
        raise Refusal(f"Its module does more than normalize: it also runs {listed}.")
