"""Sees what passes by the norms and activations of a model, without being part of it.

A dispatch mode meets every operator that the model calls, however it calls it: in a module, as a function, in a
scripted submodule, in a subclass with a forward of its own. A norm is recognized by the very buffer that it passes as
its running mean. Module hooks tell whose forward is running; they are global ones, so that nothing is written into the
model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchnorm.functional.observing import observing
from batchnorm.monitor.saturation import ActivationStream, activation_of
from batchnorm.monitor.stream import LayerStream, Reference
from batchnorm.nn.calling import compiled_modules_eager
from batchnorm.nn.operators import NORM_OPERATORS, named_arguments
from batchnorm.nn.select import NormModule

__all__ = ["Observations", "observed"]


class Observations:
    """What has been seen so far, in the order in which it was first seen."""

    def __init__(self, norms: Mapping[str, NormModule]) -> None:
        self.references: dict[str, Reference] = {}
        for name, norm in norms.items():
            if keeps_statistics(norm):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                self.references[name] = Reference.of(norm.running_mean, norm.running_var, norm.eps)
        self.layers: dict[str, LayerStream] = {}
        self.activations: dict[tuple[Any, ...], ActivationStream] = {}


def keeps_statistics(norm: NormModule) -> bool:
    """Return whether a norm has stored statistics with values in them."""
    return norm.running_mean is not None and norm.running_var is not None and not is_lazy(norm.running_mean)


@contextmanager
def observed(model: Module, norms: Mapping[str, NormModule], into: Observations, *, functional: bool) -> Iterator[None]:
    """Watch this thread's calls of ``model`` for as long as the context lasts.

    Args:
        model: whose forwards are watched.
        norms: the norms to watch, by name.
        into: takes up what is seen.
        functional: also watch calls of batch norm functions that are given other buffers of the model.
    """
    observer = _Observer(model, norms, into, functional)
    with ExitStack() as stack:
        stack.enter_context(compiled_modules_eager)
        stack.callback(register_module_forward_pre_hook(observer.enter).remove)
        stack.callback(register_module_forward_hook(observer.leave, always_call=True).remove)
        stack.enter_context(observing(observer.masked_norm))
        stack.enter_context(observer)
        yield


@dataclass
class _Running:
    """A module whose forward is running, and whether it has been seen to normalize."""

    module: Module
    name: str
    seen: bool = False


@dataclass(frozen=True)
class _Signature:
    """What about an operator matters here."""

    operator: str
    schema: Any
    is_norm: bool
    unit_dim: int | None  # where the units of its output are
    may_activate: bool


_FEATURES_LAST = {"addmm", "mm", "bmm", "baddbmm", "linear", "matmul", "native_layer_norm", "layer_norm", "embedding"}
_ACTIVATIONS = {
    "relu", "relu6", "sigmoid", "tanh", "hardsigmoid", "hardtanh", "threshold", "clamp", "clamp_min",
}  # fmt: skip


@cache
def _signature(func: Any) -> _Signature:
    space, _, name = func._schema.name.partition("::")
    operator = name.rstrip("_")
    normalizes = func._schema.name in NORM_OPERATORS
    spatial = normalizes or "conv" in name or name in ("native_group_norm", "group_norm", "instance_norm")
    return _Signature(
        operator,
        func._schema,
        # our own operator reports itself, also above autograd, where a dispatch mode does not meet it whole
        normalizes and space != "batchnorm",
        1 if spatial else -1 if operator in _FEATURES_LAST else None,
        space == "aten" and operator in _ACTIVATIONS,
    )


class _Observer(TorchDispatchMode):
    def __init__(self, model: Module, norms: Mapping[str, NormModule], into: Observations, functional: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._norms = norms
        self._into = into
        self._functional = functional
        self._names = {id(module): name for name, module in model.named_modules()}
        self._thread = threading.get_ident()
        self._running: list[_Running] = []
        self._busy = False
        self._start_forward(())

    # -- operators ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        signature = _signature(func)
        if signature.is_norm or (self._running and (signature.may_activate or signature.unit_dim is not None)):
            self._look(self._operator, signature, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method that only looks: without gradients, without seeing itself, and not during a backward pass.

        A backward pass runs forwards again where activations are checkpointed; what they meet has been seen before.
        """
        if self._busy or torch._C._current_graph_task_id() != -1:
            return
        self._busy = True
        try:
            with torch.no_grad():
                method(*args)
        finally:
            self._busy = False

    def _operator(self, signature: _Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = named_arguments(signature.schema, args, kwargs)
        if signature.is_norm:
            eps = given.get("eps", given.get("epsilon", 1e-5))
            self._norm(given["input"], given.get("running_mean"), given.get("running_var"), eps)
        if signature.unit_dim is not None:
            self._unit_dim = signature.unit_dim
        elif signature.may_activate:
            self._activation(signature.operator, given)

    def masked_norm(
        self, x: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float, mask: Tensor | None
    ) -> None:
        """Take note of a call of the operator ``batchnorm::batch_norm``."""
        self._unit_dim = 1
        self._look(self._norm, x, mean, variance, eps, mask)

    def _norm(
        self, x: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float, mask: Tensor | None = None
    ) -> None:
        name = self._buffers.get(id(mean))
        if name is None or not _has_values(x) or x.dim() < 2 or mean is None or variance is None:
            return
        if name not in self._into.references:
            self._into.references[name] = Reference.of(mean, variance, eps)
        self._add(name, x, mask)
        for running in self._running:
            running.seen = running.seen or running.name == name

    def _add(self, name: str, x: Tensor, mask: Tensor | None = None) -> None:
        layer = self._into.layers.get(name)
        if layer is None:
            layer = self._into.layers[name] = LayerStream(name, self._into.references[name])
        layer.add(x, mask, samples=self._samples, again=name in self._called)
        if self._running:
            self._called.add(name)

    def _activation(self, operator: str, given: Mapping[str, Any]) -> None:
        z = given.get("self", given.get("input"))
        kind = activation_of(operator, given)
        module = self._running[-1].module
        if kind is None or not _has_values(z) or z.dim() == 0 or isinstance(module, torch.nn.RNNBase):
            return  # the gates of a recurrent layer are meant to close
        place = (self._running[-1].name, kind.kind)
        number = self._numbers[place] = self._numbers.get(place, 0) + 1
        unit_dim = self._unit_dim if z.dim() > 1 else -1
        key = (*place, number, z.shape[unit_dim])
        stream = self._into.activations.get(key)
        if stream is None:
            name = place[0] if number == 1 else f"{place[0]} #{number}"
            stream = ActivationStream(name, kind, z.shape[unit_dim], z.device)
            self._into.activations[key] = stream
        stream.add(z.detach(), unit_dim)

    # -- modules -----------------------------------------------------------------------------------------------------

    def _mine(self, module: Module) -> bool:
        known = id(module) in self._names and threading.get_ident() == self._thread
        return known and torch._C._current_graph_task_id() == -1

    def enter(self, module: Module, args: tuple[Any, ...]) -> None:
        """Note that a module of the model begins its forward."""
        if not self._mine(module):
            return
        if module is self._model:
            self._running.clear()  # whatever an interrupt has left
        if not self._running:
            self._start_forward(args)
        self._running.append(_Running(module, self._names[id(module)]))

    def leave(self, module: Module, args: tuple[Any, ...], output: Any) -> None:
        """Note that it ends, with an output or with an exception (no output)."""
        if not self._mine(module) or not any(running.module is module for running in self._running):
            return
        while (running := self._running.pop()).module is not module:
            pass
        if not running.seen and output is not None and running.name in self._norms and args:
            self._look(self._unseen_norm, running.name, args[0])

    def _unseen_norm(self, name: str, x: Any) -> None:
        """Take the input of a norm module that normalizes by other means than a batch norm operator."""
        reference = self._into.references.get(name)
        if reference is not None and _has_values(x) and x.dim() > 1 and x.shape[1] == reference.mean.numel():
            self._add(name, x)

    def _start_forward(self, args: tuple[Any, ...]) -> None:
        """Forget what belongs to the last forward; buffers may have been replaced since (``model.to``)."""
        self._called: set[str] = set()
        self._numbers: dict[tuple[str, str], int] = {}
        self._unit_dim = 1
        first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
        self._samples = None if first is None else first.shape[0]
        self._buffers: dict[int, str] = {}
        if self._functional:
            for name, buffer in self._model.named_buffers():
                owner, _, attribute = name.rpartition(".")
                self._buffers[id(buffer)] = owner if attribute == "running_mean" else name
        for name, norm in self._norms.items():
            if norm.running_mean is not None:
                self._buffers[id(norm.running_mean)] = name


def _has_values(x: Any) -> bool:
    """Return whether ``x`` is an ordinary tensor: not one that a compiler or an exporter traces with."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_floating_point() and not x.is_meta
