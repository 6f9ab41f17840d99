"""What several rules ask about a model: who feeds a norm, and which modules can change places."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import Module, Sequential
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.dataflow.operator_kinds import PASSING, family
from batchnorm.errors import StateError
from batchnorm.placement.insertion import KeyChanges

__all__ = ["initial_statistics", "layer_name", "norm_module", "setting", "sole_reader", "source", "stored", "swap"]


def norm_module(model: Module, norm: Call) -> _BatchNorm | None:
    """Return the norm whose forward made the call; None for a functional one."""
    module = model.get_submodule(norm.module)
    return module if isinstance(module, _BatchNorm) else None


def stored(model: Module, call: Call, argument: str) -> Tensor | None:
    """Return the model's own tensor that a call reads as ``argument``; None if it reads none, or one without memory."""
    value = call.args.get(argument)
    if not isinstance(value, Value) or not value.names:
        return None
    holder, _, name = value.names[0].rpartition(".")
    tensor = getattr(model.get_submodule(holder), name, None)
    return tensor.detach() if isinstance(tensor, Tensor) and not tensor.is_meta else None


def initial_statistics(mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether running statistics are those that a new norm has: mean 0 and variance 1 in every channel."""
    if mean is None or var is None or not var.numel():
        return False
    return not mean.any() and bool((var == 1).all())


def setting(name: str, option: str, value: float) -> Callable[[Module], KeyChanges]:
    """Return what sets an option, momentum or ε, of the norm of that name."""

    def apply(copy: Module) -> KeyChanges:
        try:
            norm = copy.get_submodule(name)
        except AttributeError:
            norm = None
        if not isinstance(norm, _BatchNorm):
            raise StateError(
                f"{name}: expected the norm that was there when the model was read, and it is not. "
                "Call check on the model as it is now."
            )
        setattr(norm, option, value)
        return KeyChanges({}, [])

    return apply


def layer_name(call: Call) -> str:
    """Return the name of the module that holds the call's weight, or else of the one whose forward made it."""
    holder = call.holder("weight")
    return call.module if holder is None else holder


def source(value: Value) -> Call | None:
    """Return the call that computed ``value``, looking through those that only hand it on."""
    call = value.producer
    while call is not None and family(call) in PASSING:
        call = next(call.tensor_args()).producer
    return call


def sole_reader(graph: Graph, value: Value) -> Call | None:
    """Return the one operator that reads ``value``, looking through those that only hand it on; None if more do."""
    while True:
        readers = graph.readers(value)
        if len(readers) != 1 or graph.is_output(value):
            return None
        if family(readers[0]) not in PASSING:
            return readers[0]
        value = readers[0].output


def swap(model: Module, graph: Graph, first: Call, second: Call) -> Callable[[Module], KeyChanges] | None:
    """Return what makes two calls change places, if they are neighbouring modules of one ``Sequential``; else None.

    The modules keep their names, so that the keys of the state dict stay as they are; only the order changes.
    """
    one, other = first.module, second.module
    parent, _, _ = one.rpartition(".")
    if not one or other.rpartition(".")[0] != parent or one == other:
        return None
    if any(len(graph.runs_of(name)) != 1 for name in (one, other)) or not _is_all(graph, first, second):
        return None
    children = one.removeprefix(f"{parent}."), other.removeprefix(f"{parent}.")
    return (lambda copy: _swap(copy, parent, *children)) if _neighbours(model, parent, *children) else None


def _is_all(graph: Graph, first: Call, second: Call) -> bool:
    """Whether each call gives what its module does, and nobody but the second reads what the first one gives."""
    runs = [(graph.runs_of(call.module)[0], call) for call in (first, second)]
    alone = all(run.outputs == (call.output,) for run, call in runs)
    return alone and graph.only_reader(first.output) is second


def _neighbours(model: Module, parent: str, one: str, other: str) -> bool:
    sequential = model.get_submodule(parent)
    if not isinstance(sequential, Sequential) or type(sequential).forward is not Sequential.forward:
        return False
    names = list(sequential._modules)
    modules = list(sequential._modules.values())
    position = names.index(one)
    unique = all(sum(m is modules[i] for m in modules) == 1 for i in (position, names.index(other)))
    return unique and names[position + 1 : position + 2] == [other]


def _swap(model: Module, parent: str, one: str, other: str) -> KeyChanges:
    try:
        still = _neighbours(model, parent, one, other)
    except (AttributeError, ValueError):
        still = False
    if not still:
        raise StateError(
            f"{parent or 'the model'}: expected {one} and {other} next to each other, as they were when the model was "
            "read. Call check on the model as it is now."
        )
    children = model.get_submodule(parent)._modules
    order = list(children)
    position = order.index(one)
    order[position], order[position + 1] = other, one
    items = [(name, children[name]) for name in order]
    children.clear()
    children.update(items)
    return KeyChanges({}, [])
