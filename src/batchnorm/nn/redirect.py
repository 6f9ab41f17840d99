"""Calls of a model's norms redirected, for as long as a block lasts, to replicas with other settings.

What a norm does with a batch is decided by ``training``, ``momentum`` and its buffers. To change one of them on the
norm itself for the time of a block would be undone by the next ``model.train()``, seen by whoever looks at the model,
and left behind by an interrupt. So the norm is not changed: its ``forward`` is taken over by a :class:`_Redirect`,
which at each call makes a shallow copy of the norm as it is then, gives that one the settings of the blocks that are
open, and calls it. Nothing has to be put back after a call, however it ends and however many threads are at it.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.blocks import undone
from batchnorm.errors import StateError
from batchnorm.models.calling import EagerUse
from batchnorm.models.preconditions import require_module
from batchnorm.models.transaction import on_failure
from batchnorm.nn.select import NormModule, listed, meant_by, named_norms, select_norms

__all__ = [
    "AXES",
    "Redirection",
    "norms_for",
    "original_of",
    "overlooked",
    "redirected",
    "rule_of",
    "set_aside",
    "shallow_copy",
]

_Norm = TypeVar("_Norm", bound=Module)

AXES = ("statistics", "update")
"""What rules are about, in the order in which they are applied: an update depends on what normalizes.

Rules of different axes do not know of each other; of several of one axis the innermost decides.
"""


class Redirection(Protocol):
    """What one block asks of the norms that it is opened for."""

    @property
    def axis(self) -> str:
        """One of ``AXES``."""

    def require(self, others: Sequence[Redirection]) -> None:
        """Refuse to be opened within the rules of other blocks; :class:`StateError` says why."""

    def apply(self, norm: NormModule, replica: NormModule, inputs: Mapping[str, Any]) -> Callable[[], None] | None:
        """Change the replica before it is called; return what is to be done once it has returned, or None.

        Args:
            norm: as the model has it.
            replica: a shallow copy, on which the rule of an earlier axis may have been at work.
            inputs: what it is called on, by the names that this library's layers give them.
        """


_COMPILED = (
    "this block cannot be entered in compiled code, where it would change what the norms do. Enter it around the call "
    "of what is compiled, which runs eagerly in it; in eval mode no_update, accumulated_update and use('running') may "
    "stand in the code."
)


def norms_for(
    verb: str, model: Module, names: str | Sequence[str] | None, as_asked: Callable[[NormModule], bool]
) -> dict[str, NormModule]:
    """Return the norms that ``names`` means, for a block that redirects their calls.

    A forward may open such blocks itself, and goes on to do so when its model is folded or compiled. So there may be no
    norm left; and in code that is being compiled, a block that changes nothing is open for no norm.

    Args:
        verb: the name of the block.
        model: what it is opened for.
        names: as the user gave them.
        as_asked: whether a norm does in its present mode what the block asks of it.

    Raises:
        ArgumentTypeError: ``model`` is no module, or a name no text.
        StateError: the calls of a norm cannot be redirected; or the code is being compiled, and the block would change
            something.
        UnknownNameError: a name means no norm.
    """
    require_module(verb, model)
    for name, module in model.named_modules():
        _require_reachable(verb, name or type(module).__name__, module)
    if torch.compiler.is_compiling():
        # all of them: what finds names is more than torch.compile can follow
        if not all(as_asked(norm) for norm in named_norms(model).values()):
            raise StateError(_COMPILED)
        return {}
    norms = _named(verb, model, names)
    for name, norm in norms.items():
        own = norm.__dict__.get("forward")
        if own is not None and not isinstance(own, _Redirect) and getattr(own, "__self__", None) is not norm:
            raise StateError(
                f"{verb}: the forward of {name or type(norm).__name__} was replaced on the instance by something that "
                "cannot be called for another norm. Remove what wraps it first, or name other norms."
            )
    return norms


def require_arguments(verb: str, model: Any, names: str | Sequence[str] | None = None) -> None:
    """Refuse what no block can be opened for, whatever mode the model is in.

    Raises:
        ArgumentTypeError: ``model`` is no module, or a name no text.
        UnknownNameError: a name means no norm.
    """
    require_module(verb, model)
    if names is not None and not torch.compiler.is_compiling() and named_norms(model):
        _named(verb, model, names)


def _named(verb: str, model: Module, names: str | Sequence[str] | None) -> dict[str, NormModule]:
    if not named_norms(model):
        if model.training:
            # the caller of the block is three frames above: its generator, contextlib, the with statement
            warnings.warn(
                f"{verb}: {type(model).__name__} holds no batch norm, so that the block does nothing. Pass the model "
                "that does, if there is one.",
                stacklevel=5,
            )
        return {}
    if names is not None and not model.training:  # a folded model has other modules in the place of some norms
        modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
        norms = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, NormModule)}
        names = [
            name
            for name in listed(names)
            if any(meant_by(name, n) for n in norms) or not any(meant_by(name, n) for n in modules)
        ]
        if not names:
            return {}
    return select_norms(model, names)


def _require_reachable(verb: str, name: str, module: Module) -> None:
    if isinstance(module, torch.nn.DataParallel):
        raise StateError(
            f"{verb}: {name} is DataParallel, which calls copies of the norms on other devices. Use "
            "DistributedDataParallel, or pass and call the module inside."
        )
    if isinstance(module, torch.jit.ScriptModule) and any("running_mean" in key for key, _ in module.named_buffers()):
        raise StateError(
            f"{verb}: {name} is scripted, and what its norms do is compiled into it. Pass the module that it was made "
            "from."
        )


def redirected(rules: Mapping[NormModule, Redirection]) -> Iterator[None]:
    """Let each norm follow its rule, in all threads, within the rules of the blocks around this one.

    It is the body of a block's generator: ``yield from redirected(rules)``, see :func:`batchnorm.blocks.undone`.

    Raises:
        StateError: the block is in code that is being compiled, or was.
    """
    if not rules:
        yield
        return
    eager = EagerUse()  # what is compiled already would not notice

    def add() -> None:
        try:
            eager.begin()
        except RuntimeError as error:
            raise StateError(_COMPILED) from error
        for norm, rule in rules.items():
            _add(norm, rule)

    def remove() -> None:
        for norm, rule in rules.items():
            _remove(norm, rule)
        eager.end()

    yield from undone(add, remove)


@contextmanager
def overlooked(model: Module, axis: str) -> Iterator[None]:
    """Have the norms of a model follow no rule of that axis that is open now; those opened in the block they follow."""
    open_now = [
        (current, [rule for rule in current.rules if rule.axis == axis])
        for module in model.modules()
        if isinstance(current := module.__dict__.get("forward"), _Redirect)
    ]

    def overlook() -> None:
        for current, rules in open_now:
            current.overlooked = (*current.overlooked, *rules)

    def follow() -> None:
        for current, rules in open_now:
            current.overlooked = tuple(rule for rule in current.overlooked if rule not in rules)

    on_failure(follow)
    yield from undone(overlook, follow)


def rule_of(norm: Module, axis: str) -> Redirection | None:
    """Return the rule of that axis that a norm follows now."""
    current = norm.__dict__.get("forward")
    if not isinstance(current, _Redirect):
        return None
    return next((r for r in reversed(current.rules) if r.axis == axis and r not in current.overlooked), None)


def shallow_copy(norm: _Norm) -> _Norm:
    """Return a module with the tensors and settings that the norm has now, whatever it is given later."""
    twin: _Norm = object.__new__(type(norm))
    twin.__dict__.update(norm.__dict__)
    twin.__dict__["_parameters"] = dict(norm._parameters)
    twin.__dict__["_buffers"] = dict(norm._buffers)
    return twin


def set_aside(replica: NormModule) -> None:
    """Give a replica copies of all that it counts in, so that whatever it is called on leaves no trace in the norm."""
    copies = {k: None if b is None else b.clone() for k, b in replica._buffers.items()}
    for key, copy_of in copies.items():
        if copy_of is not None:
            copy_of._batchnorm_original = replica._buffers[key]  # type: ignore[attr-defined]
    replica.__dict__["_buffers"] = copies
    counter = replica.__dict__.get("_refused")
    if counter is not None:
        replica.__dict__["_refused"] = counter.clone()


def original_of(tensor: Tensor) -> Tensor | None:
    """Return the buffer that a tensor is a copy of, made by :func:`set_aside`; None for any other tensor."""
    original: Tensor | None = getattr(tensor, "_batchnorm_original", None)
    if original is None:
        return None
    further = original_of(original)
    return original if further is None else further


_lock = threading.Lock()


def _add(norm: NormModule, rule: Redirection) -> None:
    with _lock:
        current = norm.__dict__.get("forward")
        if not isinstance(current, _Redirect):
            # __dict__, for some classes watch what is set on them
            current = norm.__dict__["forward"] = _Redirect(norm, None if current is None else current.__func__)
        rule.require(current.rules)
        current.rules = (*current.rules, rule)


def _remove(norm: NormModule, rule: Redirection) -> None:
    with _lock:
        current = norm.__dict__.get("forward")
        if not isinstance(current, _Redirect):
            return
        current.rules = tuple(r for r in current.rules if r is not rule)
        if not current.rules:
            current.leave()


class _Redirect:
    """The ``forward`` of a norm for which blocks are open.

    Attributes:
        norm: whose it is.
        own: the function that took the place of the class's forward on the instance before, or None.
        rules: of the blocks, the outermost first.
        overlooked: those of them that do not count for the moment.
    """

    def __init__(self, norm: NormModule, own: Callable[..., Any] | None = None) -> None:
        self.norm = norm
        self.own = own
        self.rules: tuple[Redirection, ...] = ()
        self.overlooked: tuple[Redirection, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        norm, rules = self.norm, self.rules
        if not rules:  # a copy of the norm that was made while a block was open
            self.leave()
        if not rules or any(isinstance(a, torch.fx.Proxy) for a in (*args, *kwargs.values())):
            return self._forward_of(norm)(*args, **kwargs)
        replica = object.__new__(type(norm))
        replica.__dict__.update(norm.__dict__)
        replica.__dict__.pop("forward", None)  # a block may have ended in another thread meanwhile
        inputs = {**dict(zip(("input", "residual", "mask"), args, strict=False)), **kwargs}
        afterwards = []
        for axis in AXES:
            rule = next((r for r in reversed(rules) if r.axis == axis and r not in self.overlooked), None)
            if rule is not None:
                afterwards.append(rule.apply(norm, replica, inputs))
        before = dict(replica.__dict__)
        output = self._forward_of(replica)(*args, **kwargs)
        for then in afterwards:
            if then is not None:
                then()
        for key, value in replica.__dict__.items():
            if key not in before or before[key] is not value:  # what a forward notes on its layer
                norm.__dict__[key] = value
        return output

    def _forward_of(self, norm: NormModule) -> Callable[..., Any]:
        return MethodType(type(norm).forward if self.own is None else self.own, norm)

    def leave(self) -> None:
        """Take oneself away from the norm."""
        if self.own is None:
            self.norm.__dict__.pop("forward", None)
        else:
            self.norm.__dict__["forward"] = MethodType(self.own, self.norm)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy without rules: a block is opened for a model, and not for its copies."""
        return type(self)(copy.deepcopy(self.norm, memo), self.own)

    def __reduce__(self) -> Any:
        return type(self), (self.norm, self.own)
