"""A norm put behind one layer of a module tree, so that it can be taken out again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Sequential
from torch.nn.modules.conv import _ConvNd

from batchnorm.dataflow.graph import Call, Graph, Value
from batchnorm.errors import StateError
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.placement.sites import Placement

__all__ = ["Insertion", "KeyChanges", "module_obstacle", "owner_of", "slots_of"]

_NORM = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


def slots_of(model: Module, module: Module) -> tuple[str, ...]:
    """Return every qualified name under which ``module`` is registered in ``model``."""
    return tuple(name for name, m in model.named_modules(remove_duplicate=False) if m is module)


def owner_of(model: Module, weight: object) -> str | None:
    """Return the name of the module that holds a weight read by an operator; None for one that is not a parameter."""
    if not isinstance(weight, Value) or weight.kind != "state":
        return None
    return _owner(weight.names[0])


def module_obstacle(model: Module, graph: Graph, layer: Call) -> str | None:
    """Return why a layer cannot be rewritten by itself, as a sentence; None if it can.

    It can where the operator is all that one plain module does, once, with parameters that nobody else uses.
    """
    weight = layer.args["weight"]
    name = owner_of(model, weight)
    if name is None or not isinstance(weight, Value):
        return "Its weight is computed (by a parametrization, or by code), not a parameter of the layer."
    module = model.get_submodule(name)
    if not isinstance(module, _ConvNd | torch.nn.Linear):
        return f"The operator is called by the code of {type(module).__name__}, not by a layer of its own."
    slots = slots_of(model, module)
    if "" in slots:
        return "It is the model itself."
    if any(isinstance(model.get_submodule(_owner(slot)), torch.jit.ScriptModule) for slot in slots):
        return "It is part of a scripted module, which cannot be edited."
    for tensor in (weight, layer.args["bias"]):
        if isinstance(tensor, Value) and tensor.kind != "state":
            return "Its bias is computed (by a parametrization, or by code), not a parameter of the layer."
        if isinstance(tensor, Value) and not all(owner in slots for owner in map(_owner, tensor.names)):
            return "It shares its parameters with another module."
        if isinstance(tensor, Value) and len(graph.readers(tensor)) > 1:
            return "It is called more than once, or its parameters are read elsewhere too."
    runs = graph.runs_of(name)
    if len(runs) != 1 or runs[0].outputs != (layer.output,):
        return f"The operator does not run as the forward of {name}: code calls it with that layer's parameters."
    return None


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


class KeyChanges(NamedTuple):
    """How a rewrite changes the keys of a state dict: old keys with their new ones, and old keys that are gone."""

    renamed: dict[str, str]
    dropped: list[str]


@dataclass
class Insertion:
    """A norm to put behind a layer: first described, then done, and undone if need be.

    Attributes:
        slots: every name under which the layer is registered.
        role: the name that it gets next to its norm, ``"conv"`` or ``"linear"``.
        channels: how many channels it puts out.
        rank: number of axes of its output.
    """

    slots: tuple[str, ...]
    role: str
    channels: int
    rank: int
    _taken: tuple[Module, Tensor | None] | None = field(default=None, repr=False)

    @classmethod
    def at(cls, model: Module, site: Placement) -> Insertion:
        """Describe the insertion at a site that has no obstacle."""
        name = owner_of(model, site.layer.args["weight"])
        assert name is not None
        module = model.get_submodule(name)
        shape = site.layer.output.shape
        role = "linear" if isinstance(module, torch.nn.Linear) else "conv"
        return cls(slots_of(model, module), role, shape[1], len(shape))

    @property
    def layer(self) -> str:
        """The layer's (first) name."""
        return self.slots[0]

    @property
    def norm(self) -> str:
        """The norm's (first) name, once it is placed."""
        return f"{self.layer}.norm"

    def do(self, model: Module) -> KeyChanges:
        """Wrap the layer together with a new norm and drop its bias.

        In eval mode the norm starts as the identity: its mean is minus the bias and its variance 1 − ε.

        Returns:
            How the keys of the state dict change.

        Raises:
            StateError: the layer is not there any more, or has been wrapped already.
        """
        module = _layer_at(model, self.slots)
        keys = list(module.state_dict())
        bias = module._parameters.get("bias")
        norm = self._make_norm(module, bias)
        pair = Sequential(OrderedDict([(self.role, module), ("norm", norm)]))
        pair.training = module.training
        self._taken = (module, bias)  # before the first change, so that undo() also mends one cut short
        if bias is not None:
            module._parameters["bias"] = None
        self._register(model, pair)
        dropped = [f"{slot}.bias" for slot in self.slots] if bias is not None else []
        renamed = {f"{slot}.{key}": f"{slot}.{self.role}.{key}" for slot in self.slots for key in keys}
        return KeyChanges({old: new for old, new in renamed.items() if old not in dropped}, dropped)

    def undo(self, model: Module) -> None:
        """Put the layer back, with its bias; nothing happens if it was never wrapped."""
        if self._taken is None:
            return
        module, bias = self._taken
        if bias is not None:
            module._parameters["bias"] = bias  # type: ignore[assignment]
        self._register(model, module)
        self._taken = None

    def _register(self, model: Module, module: Module) -> None:
        for slot in self.slots:
            parent, _, child = slot.rpartition(".")
            model.get_submodule(parent)._modules[child] = module

    def _make_norm(self, module: Module, bias: Tensor | None) -> torch.nn.modules.batchnorm._BatchNorm:
        weight = module._parameters["weight"]
        assert weight is not None
        # statistics of half-precision data are kept in single precision: a running mean would stop moving otherwise
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        norm = _NORM[self.rank](self.channels, device=weight.device, dtype=dtype)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_var.fill_(1 - norm.eps)
        if bias is not None:
            norm.running_mean.copy_(-bias.detach())
        norm.train(module.training)
        return norm


def _layer_at(model: Module, slots: tuple[str, ...]) -> Module:
    try:
        modules = [model.get_submodule(slot) for slot in slots]
    except AttributeError:
        modules = []
    weight = modules[0]._parameters.get("weight") if modules else None
    if weight is None or any(module is not modules[0] for module in modules):
        raise StateError(
            f"{slots[0]}: expected the layer that was there when the model was read, and it is not. "
            "Call place or check on the model as it is now."
        )
    return modules[0]
