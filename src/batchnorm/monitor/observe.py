"""Sees what passes by the norms and activations of a model, in all threads, without being part of it.

Every operator that the model calls is met, however it calls it: in a module, as a function, in a scripted submodule, in
a subclass with a forward of its own. A norm is recognized by the very buffer that it passes as its running mean. Where
all that is to be seen are modules of torch, later calls are looked at by hooks alone (:mod:`batchnorm.monitor.places`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from batchnorm.blocks import undone
from batchnorm.models.calling import EagerUse
from batchnorm.models.transaction import on_failure
from batchnorm.monitor.forwards import ModelCall, ModuleHooks, RunningModule
from batchnorm.monitor.operator_traits import OperatorTraits, traits_of
from batchnorm.monitor.places import (
    ModuleStep,
    Traces,
    WatchedPlace,
    activation_in,
    is_given,
    is_visible,
    reports_itself,
)
from batchnorm.monitor.saturation import ActivationCall, ActivationStream, activation_of
from batchnorm.monitor.stream import LayerStream, ReferenceStatistics
from batchnorm.nn.operators import eps_key, named_arguments
from batchnorm.nn.select import NormModule
from batchnorm.observers import attach, detach, transformed

__all__ = ["ModelObserver", "Observations"]


class Observations:
    """What has been seen so far, in the order in which it was first seen.

    Args:
        references: what each place is compared with, by name.
        window: how many samples count, the last ones; None for all.
        every: of the calls of a model every so many-th is looked at.
    """

    def __init__(
        self, references: Mapping[str, ReferenceStatistics], window: int | None = None, every: int = 1
    ) -> None:
        self.references = dict(references)
        self.window = window
        self.every = every
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget all that has been seen."""
        with self.lock:
            self.layers: dict[str, LayerStream] = {}
            self.activations: dict[tuple[Any, ...], ActivationStream] = {}
            self._calls: dict[str, int] = {}

    def counts(self, root: str) -> bool:
        """Count a call of the module of that name, and return whether it is one to look at."""
        with self.lock:
            number = self._calls.get(root, 0)
            self._calls[root] = number + 1
        return number % self.every == 0

    def layer(self, name: str) -> LayerStream:
        """Return the stream of a norm, begun where there is none yet."""
        with self.lock:
            stream = self.layers.get(name)
            if stream is None:
                stream = self.layers[name] = LayerStream(name, self.references[name], self.window)
            return stream

    def activation(self, key: tuple[Any, ...], name: str, kind: ActivationCall, z: Tensor) -> ActivationStream:
        """Return the stream of an activation, likewise."""
        with self.lock:
            stream = self.activations.get(key)
            if stream is None:
                stream = self.activations[key] = ActivationStream(name, kind, key[-1], z.device, self.window)
            return stream


@dataclass(eq=False)
class _Call(ModelCall):
    """A call of the model, with what has been met in it so far."""

    samples: int | None = None  # that it was given, where that is known
    unit_dim: int = 1
    name: str = ""  # of the module that was called
    steps: list[ModuleStep] = field(default_factory=list)  # called so far, or to be called if seen by hooks
    hidden: bool = False  # whether something was met that no hook can see
    numbers: dict[tuple[str, str], int] = field(default_factory=dict)  # of activations by module and kind
    first: dict[LayerStream, int] = field(default_factory=dict)  # numbers of its samples


class ModelObserver(ModuleHooks):
    """Takes up what passes by, from :meth:`open` to :meth:`close`.

    Args:
        model: whose forwards are watched.
        norms: the norms to watch, by name.
        places: modules other than norms of which the input is watched, by name.
        into: takes up what is seen.
        functional: also watch calls of batch norm functions that are given other buffers of the model.
    """

    def __init__(
        self,
        model: Module,
        norms: Mapping[str, NormModule],
        places: Mapping[str, Module],
        into: Observations,
        *,
        functional: bool,
    ) -> None:
        super().__init__(model, norms)
        self._norms = norms
        self._places = places
        self._into = into
        self._functional = functional
        self._buffers: dict[int, tuple[str, Module, str]] = {}
        self._traces = Traces()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for as long as the context lasts."""
        eager = EagerUse()

        def begin() -> None:
            eager.begin()
            self.open()

        def end() -> None:
            self.close()
            eager.end()

        on_failure(end)
        yield from undone(begin, end)

    # -- modules ---------------------------------------------------------------------------------------------------

    def begin(self, root: Module, name: str, args: tuple[Any, ...]) -> ModelCall:
        """Note how many samples a call brings, and whether it is one to look at."""
        if self.closed or not self._into.counts(name):
            return ModelCall(root)
        first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
        samples = None if first is None else first.shape[0]
        steps = self._traces.expected(name)
        if steps is None:
            return _Call(root, True, samples=samples, name=name)
        uneventful = [None if step.place or step.name in self._places else step.name for step in steps]
        return _Call(root, True, True, uneventful, samples=samples, name=name, steps=list(steps))

    def begun(self, forward: ModelCall) -> None:
        """Let this library's own operator report its calls in this thread."""
        attach(self.masked_norm)

    def ended(self, forward: ModelCall, complete: bool) -> None:
        """Let it report them no more, and learn which modules the call has passed."""
        detach(self.masked_norm)
        if complete:
            assert isinstance(forward, _Call)
            self._traces.learn(forward.name, tuple(forward.steps[: forward.entered]), hidden=forward.hidden)

    def entered(self, forward: ModelCall, running: RunningModule) -> None:
        """Take the input of a place, before the module may change it."""
        assert isinstance(forward, _Call)
        if forward.by_hooks:
            self._entered_by_hooks(forward, running)
        if not forward.by_hooks:
            forward.steps.append(ModuleStep(running.name, forward.unit_dim))
        if running.name in self._places and running.args:
            self.look(self._module_input, forward, running.name, running.args[0])

    def _entered_by_hooks(self, forward: _Call, running: RunningModule) -> None:
        """Take the input of a place that only hooks see; show operators where the call goes another way than known."""
        steps, number = forward.steps, running.number
        name, unit_dim, place = steps[number] if number < len(steps) else (None, 0, None)
        forward.unit_dim = unit_dim or forward.unit_dim
        if name != running.name or not (place is None or is_visible(running.module, place, running.args)):
            del steps[number:]
            self.show_operators(forward)
        elif place == "norm":
            running.seen = True
            self.look(self._module_input, forward, name, running.args[0])
        elif place == "activation":
            self.look(self._activation, forward, activation_in(running.module), running.args[0])

    def left_unseen(self, forward: ModelCall, running: RunningModule) -> None:
        """Take the input of a norm module that normalizes by other means than a batch norm operator."""
        assert isinstance(forward, _Call)
        if not reports_itself(running.module):
            forward.hidden = True  # what it does next time is not known
        if running.args:
            self._module_input(forward, running.name, running.args[0])

    def _module_input(self, forward: _Call, name: str, x: Any) -> None:
        reference = self._into.references.get(name)
        if reference is None or transformed():
            return  # under vmap and its like a module is given a stand-in for many inputs
        if _has_values(x) and x.dim() > 1:
            self._add(forward, name, x)

    def _add(self, forward: _Call, name: str, x: Tensor, mask: Tensor | None = None) -> None:
        layer = self._into.layers.get(name) or self._into.layer(name)
        if x.shape[1] != layer.reference.mean.shape[0]:
            return  # a norm refuses it
        forward.first[layer] = layer.add(x, mask, samples=forward.samples, first=forward.first.get(layer))

    # -- operators -------------------------------------------------------------------------------------------------

    def operator(self, forward: ModelCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operator that is about to run."""
        traits = traits_of(func)
        if traits is None:
            return
        if traits.unit_dim is not None and not traits.is_norm and not traits.may_activate:
            assert isinstance(forward, _Call)
            forward.unit_dim = traits.unit_dim
            return
        self.look(self._operator, forward, func, traits, args, kwargs)

    def _operator(
        self, forward: _Call, func: Any, traits: OperatorTraits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        given = named_arguments(func, args, kwargs)
        if traits.is_norm:
            running = given.get("running_mean"), given.get("running_var")
            self._norm(forward, given["input"], *running, given[eps_key(given)])
        if traits.unit_dim is not None:
            forward.unit_dim = traits.unit_dim
        elif traits.may_activate:
            self._activation(forward, activation_of(traits.operator, given), given.get("self", given.get("input")))

    def masked_norm(
        self, x: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float, mask: Tensor | None
    ) -> None:
        """Take note of a call of the operator ``batchnorm::batch_norm``."""
        forward = self.current
        if isinstance(forward, _Call):
            forward.unit_dim = 1
            self.look(self._norm, forward, x, mean, variance, eps, mask, True)

    def _norm(
        self,
        forward: _Call,
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float,
        mask: Tensor | None = None,
        reported: bool = False,
    ) -> None:
        if mean is None or variance is None or not _has_values(x) or x.dim() < 2:
            return
        name = self._name_of_buffer(mean)
        if name is None:
            return
        for running in forward.running:
            running.seen = running.seen or running.name == name
        if name not in self._into.references:
            self._into.references[name] = ReferenceStatistics.of(mean, variance, eps)
        self._add(forward, name, x, mask)
        innermost = forward.running[-1]
        if innermost.name != name or not is_given(x, innermost.args):
            forward.hidden = True
        elif not reports_itself(innermost.module):
            self._note(forward, innermost, None if reported else "norm")

    def _name_of_buffer(self, mean: Tensor) -> str | None:
        """Return which norm keeps its running mean in this buffer; it may have got another since (``model.to``)."""
        name, owner, key = self._buffers.get(id(mean), (None, None, ""))
        if owner is not None and getattr(owner, key, None) is mean:  # a script has its buffers elsewhere
            return name
        buffers: dict[int, tuple[str, Module, str]] = {}
        if self._functional:
            for prefix, module in self._model.named_modules():
                for key, buffer in module._buffers.items():
                    name = prefix if key == "running_mean" else f"{prefix}.{key}".lstrip(".")
                    buffers[id(buffer)] = (name, module, key)
        for name, norm in self._norms.items():
            buffers[id(norm.running_mean)] = (name, norm, "running_mean")
        self._buffers = buffers
        return buffers.get(id(mean), (None,))[0]

    def _activation(self, forward: _Call, kind: ActivationCall | None, z: Any) -> None:
        if kind is None or not _has_values(z) or z.dim() == 0:
            return
        innermost = forward.running[-1]
        if isinstance(innermost.module, torch.nn.RNNBase):
            return  # the gates of a recurrent layer are meant to close
        place = (innermost.name, kind.kind)
        number = forward.numbers[place] = forward.numbers.get(place, 0) + 1
        unit_dim = forward.unit_dim if z.dim() > 1 else -1
        key = (*place, number, z.shape[unit_dim])
        name = place[0] if number == 1 else f"{place[0]} #{number}"
        self._into.activation(key, name, kind, z).add(z.detach(), unit_dim)
        self._note(forward, innermost, "activation" if is_given(z, innermost.args) else None)

    def _note(self, forward: _Call, running: RunningModule, place: WatchedPlace | None) -> None:
        """Note what a module does with what it is given, and whether a hook sees it; None: not that."""
        if forward.by_hooks or forward.hidden:
            return
        step = forward.steps[running.number]
        if place is None or step.place is not None or not is_visible(running.module, place, running.args):
            forward.hidden = True
        else:
            forward.steps[running.number] = step._replace(place=place)


def _has_values(x: Any) -> bool:
    """Return whether ``x`` is an ordinary tensor: not one that a compiler or an exporter traces with."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_floating_point() and not x.is_meta
