"""Which places of a model hooks alone can see, learned from calls of which every operator was met.

A dispatch mode meets whatever runs, and costs a tenth of a millisecond an operator beside convolutions that empty the
caches. Most models need it only once: each norm is a call of torch's module, each activation too, and what a module is
given is told by its hook. Whether that is so shows in a call of which all operators are met, and so does the order in
which the modules are called. A later call is looked at by hooks alone as long as it calls the same modules in the same
order; where it leaves that order, operators are met again from there on, and the new order is learned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.monitor.saturation import ActivationCall, activation_of
from batchnorm.nn.batch_norm import BatchNorm2d
from batchnorm.observers import global_forward_pre_hooks, transformed

__all__ = [
    "LEARNED_ANEW",
    "ModuleStep",
    "Traces",
    "WatchedPlace",
    "activation_in",
    "is_given",
    "is_visible",
    "reports_itself",
]

LEARNED_ANEW = 16
"""Of the calls that are looked at so every many-th is looked at with all its operators, for what may have changed."""

WatchedPlace: TypeAlias = Literal["norm", "activation"]


class ModuleStep(NamedTuple):
    """A module that was called, as one in the order of all.

    Attributes:
        name: of the module.
        unit_dim: where the units of what was computed last before it are.
        place: what the module does with its first argument; None if nothing that is watched.
    """

    name: str
    unit_dim: int
    place: WatchedPlace | None = None


@lru_cache
def _called(operator: str, **arguments: Any) -> ActivationCall | None:
    return activation_of(operator, arguments)


_FORWARDS_OF_ACTIVATIONS: dict[Any, Callable[[Any], ActivationCall | None]] = {
    nn.ReLU.forward: lambda _: _called("relu"),
    nn.Sigmoid.forward: lambda _: _called("sigmoid"),
    nn.Tanh.forward: lambda _: _called("tanh"),
    nn.Hardsigmoid.forward: lambda _: _called("hardsigmoid"),
    nn.Hardtanh.forward: lambda m: _called("hardtanh", min_val=m.min_val, max_val=m.max_val),  # that of ReLU6 too
    nn.Threshold.forward: lambda m: _called("threshold", threshold=m.threshold, value=m.value),
}


def activation_in(module: Module) -> ActivationCall | None:
    """Return which activation a module of torch computes of what it is given, None for all others."""
    of = _FORWARDS_OF_ACTIVATIONS.get(getattr(type(module), "forward", None))
    return None if of is None else of(module)


def is_visible(module: Module, place: WatchedPlace, args: Sequence[Any]) -> bool:
    """Whether this call of a module is a place whose input a hook sees: torch's forward, given the hook's argument."""
    forward = getattr(type(module), "forward", None)  # a script has none there
    return (
        (forward is _BatchNorm.forward if place == "norm" else forward in _FORWARDS_OF_ACTIVATIONS)
        and len(args) == 1
        and type(args[0]) is Tensor
        and not module._forward_pre_hooks  # they may give it something else
        and "forward" not in module.__dict__
        and not transformed()
    )


def reports_itself(module: Module) -> bool:
    """Whether a module is a norm of this library: what it is given is reported, or else seen when it has ended."""
    return getattr(type(module), "forward", None) is BatchNorm2d.forward  # that of the others too


def is_given(x: Tensor, args: Sequence[Any]) -> bool:
    """Whether what an operator was given is the first of a module's arguments."""
    given = args[0] if args else None
    if type(given) is not Tensor or type(x) is not Tensor or transformed():
        return False
    return x is given or (
        x.layout == given.layout == torch.strided
        and (x.dtype, x.shape, x.stride()) == (given.dtype, given.shape, given.stride())
        and x.device == given.device
        and x.data_ptr() == given.data_ptr()
    )


@dataclass
class _Known:
    """What is known of the calls of one module.

    Attributes:
        steps: the modules called, in order; None: none are known yet.
        confirmed: whether two calls in a row, at least, were the same.
        hidden: whether something was met that no hook can see; operators are met in all calls then.
        others: number of hooks before forwards that all modules have, this watch's among them.
        uses: how many calls were looked at by hooks alone.
    """

    steps: tuple[ModuleStep, ...] | None = None
    confirmed: bool = False
    hidden: bool = False
    others: int = 0
    uses: int = 0


class Traces:
    """The modules that calls of a model, or of its parts, pass, in order, as far as hooks alone tell all."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def expected(self, root: str) -> tuple[ModuleStep, ...] | None:
        """Return the modules that a call of the module of that name will pass; None: its operators are to be met."""
        with self._lock:
            known = self._known.get(root)
            if known is None or not known.confirmed or known.others != global_forward_pre_hooks():
                return None
            known.uses += 1
            return known.steps if known.uses % LEARNED_ANEW else None

    def learn(self, root: str, steps: tuple[ModuleStep, ...], *, hidden: bool) -> None:
        """Take note of a call that ended well.

        Args:
            root: name of the module that was called.
            steps: the modules that it passed.
            hidden: whether something was met in it that no hook can see.
        """
        with self._lock:
            known = self._known.setdefault(root, _Known())
            known.hidden = known.hidden or hidden
            same = known.steps == steps and known.others == global_forward_pre_hooks()
            known.confirmed = same and not known.hidden
            known.steps, known.others = steps, global_forward_pre_hooks()
