"""A verb's call as one step: alone on its model, and done with its result in the caller's hands or not done at all.

Two calls that set one model's modes and buffers aside at the same time would each take the other's for the user's, and
put those back. So a call claims every module of its model, and a second one is refused.

An interrupt may come between any two lines of Python. What a verb is about to change it first says how to take back
(:func:`on_failure`); whatever is raised before the outermost function returns, all of that is done, the latest first.
And the state of the process that verbs borrow, of which an interrupted ``with`` block can leave something behind, is
what it was: see :mod:`batchnorm.models.process_state`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, MutableMapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.models.process_state import ProcessState

__all__ = ["claim", "on_failure", "transaction"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class _Current(threading.local):
    call: _Call | None = None


_current = _Current()
_claims: MutableMapping[Module, ReferenceType[_Call]] = WeakKeyDictionary()
"""The calls that work on a module, or did: a call that is over claims nothing, whether its entry is still here or not.

To end a claim is one assignment, so that no interrupt can prevent it.
"""


def transaction(
    verb: str, of: Callable[[Any], Iterable[Module]] | None = None
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Make a function one step: it has the modules to itself, and what it changed is taken back if it does not return.

    Args:
        verb: what the function is called in errors.
        of: gives the modules to claim from its first argument; by default those of a model, none of anything else.

    Raises:
        StateError: (the function) a module is being worked on, in another thread or by the call that this one is part
            of.
    """

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        first = next(iter(signature(function).parameters))

        @wraps(function)
        def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            subject = args[0] if args else kwargs.get(first)
            outer = _current.call
            work = _Call(verb)
            try:
                work.claim((_modules if of is None else of)(subject))
                _current.call = work
                return function(*args, **kwargs)
            except BaseException:
                work.take_back()
                raise
            finally:  # assignments alone: an interrupt can come at calls only
                work.is_over = True
                _current.call = outer

        return call

    return decorate


def claim(model: Module) -> None:
    """Have a model's modules to the verb that runs in this thread, until it returns.

    Raises:
        StateError: another call is at work on one of them.
    """
    if _current.call is not None:
        _current.call.claim(model.modules())


def on_failure(undo: Callable[[], None]) -> None:
    """Have ``undo`` called if the verb that runs in this thread does not return; nothing happens outside of one.

    Say it before the change. ``undo`` must be able to undo half of it, and do nothing the second time.
    """
    work = _current.call
    if work is not None:
        work.undo.append(undo)


class _Call:
    """One call of a verb.

    Attributes:
        verb: which.
        is_over: whether it has ended, and claims nothing any more.
        undo: what takes its changes back, in the order in which they are made.
    """

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.is_over = False
        self.undo: list[Callable[[], None]] = []
        self._process = ProcessState()

    def claim(self, modules: Iterable[Module]) -> None:
        """Have the modules to oneself until the call is over.

        Raises:
            StateError: another call has one of them.
        """
        mine = ref(self)
        for module in modules:
            while True:
                there = _claims.setdefault(module, mine)
                holder = there()
                if holder is self:
                    break
                if holder is not None and not holder.is_over:
                    raise StateError(
                        f"{self.verb}: {type(module).__name__} is being worked on by {holder.verb} already, in another "
                        "thread or by the call that runs this hook. Wait until that is done, or pass a copy: "
                        "copy.deepcopy(model)."
                    )
                with _stale:
                    if _claims.get(module) is there:
                        del _claims[module]

    def take_back(self) -> None:
        """Undo what was changed, the latest first, and put the process's state back, whatever interrupts that."""
        problem: BaseException | None = None
        steps = [self._process.restore, *self.undo]
        while steps:
            try:
                steps[-1]()
                steps.pop()
            except KeyboardInterrupt as again:
                problem = again
            except Exception as error:  # the others are undone all the same
                steps.pop()
                problem = error
        if problem is not None:
            raise problem


_stale = threading.Lock()
"""Taken to remove the claim of a call that is over: of two that find it, the second must not remove the first's."""


def _modules(model: Any) -> Iterable[Module]:
    return model.modules() if isinstance(model, Module) else ()
