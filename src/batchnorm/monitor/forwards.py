"""Tells, in every thread, which module of a model is running, and shows the operators that run in it.

Module hooks tell whose forward is running; they are global ones, so that nothing is written into the model. A dispatch
mode meets every operator, but only in the thread that it is put on: it is put on where a call of the model begins, or
later, and taken off where that ends. Where hooks tell enough it is not put on, for it costs more than they do.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from batchnorm.observers import (
    OperatorMode,
    dispatch_modes,
    in_backward,
    pop_dispatch_mode,
    push_dispatch_mode,
    set_grad_enabled,
)

__all__ = ["ModelCall", "ModuleHooks", "RunningModule"]


@dataclass(slots=True, eq=False)
class RunningModule:
    """A module whose forward is running, and whether it has been seen to normalize.

    Attributes:
        module: the module.
        name: in the model.
        args: what it was given.
        number: how many modules were called before it, in the same call of the model.
        seen: whether it has been seen to normalize.
    """

    module: Module
    name: str
    args: tuple[Any, ...]
    number: int
    seen: bool = False


@dataclass(eq=False)
class ModelCall:
    """One call of the model, or of a part of it, in one thread.

    Attributes:
        root: the module that was called.
        looked_at: whether it is; else it is passed over.
        by_hooks: whether no operators are shown, as hooks tell enough.
        uneventful: of the modules that are expected, in order, the names of those at which nothing is to be looked at.
        running: the modules of the model whose forwards are running, the outermost first.
        entered: how many modules have been called.
        mode: shows the operators; None where they are not shown.
    """

    root: Module
    looked_at: bool = False
    by_hooks: bool = False
    uneventful: Sequence[str | None] = ()
    running: list[RunningModule] = field(default_factory=list)
    entered: int = 0
    mode: OperatorMode | None = None


class _Local(threading.local):
    forward: ModelCall | None = None


class _Looking(threading.local):
    """Whether something is being measured in this thread: nobody is to watch that, whoever measures."""

    busy = False


_looking = _Looking()


class ModuleHooks(ABC):
    """Follows the calls of a model from :meth:`open` to :meth:`close`, in all threads.

    A call that runs at :meth:`close` in another thread is followed to its end; the last one to end takes the hooks off.

    Args:
        model: whose calls are followed; each call of it, or of a module in it where it is not running itself.
        norms: names of modules that are expected to be seen to normalize.
    """

    def __init__(self, model: Module, norms: Collection[str]) -> None:
        self._model = model
        self._unseen = norms
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            self._names[id(module)] = name
            # Replicas of DataParallel, and shallow copies, share this dict with the module that they are copies of.
            self._names[id(module.__dict__.get("_forward_hooks", module))] = name
        self._local = _Local()
        self._lock = threading.Lock()
        self._threads: set[int] = set()  # in which a call is followed
        self._hooks: list[Any] = []
        self.closed = True

    # -- what a subclass does --------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, root: Module, name: str, args: tuple[Any, ...]) -> ModelCall:
        """Return the record of a call that begins, which says whether it is looked at, and how."""

    @abstractmethod
    def operator(self, forward: ModelCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operator that is about to run."""

    @abstractmethod
    def entered(self, forward: ModelCall, running: RunningModule) -> None:
        """Look at a module that begins, unless it is an uneventful one that was expected."""

    @abstractmethod
    def left_unseen(self, forward: ModelCall, running: RunningModule) -> None:
        """Look at a norm that has ended with an output, and was not seen to normalize."""

    @abstractmethod
    def begun(self, forward: ModelCall) -> None:
        """Prepare this thread for a call that is looked at."""

    @abstractmethod
    def ended(self, forward: ModelCall, complete: bool) -> None:
        """Take back what :meth:`begun` did; the call has given an output, if it is complete."""

    # -- from here on what is the same for all ---------------------------------------------------------------------

    def open(self) -> None:
        """Begin to follow."""
        with self._lock:
            self.closed = False
            if not self._hooks:
                # map, so that no interrupt can come between a hook and its entry here
                self._hooks.extend(map(register_module_forward_pre_hook, [self._enter]))
                self._hooks.extend(map(partial(register_module_forward_hook, always_call=True), [self._leave]))

    def close(self) -> None:
        """Follow no more calls but those that are running in other threads; after an interrupt it may be repeated."""
        self.closed = True
        if self._local.forward is not None:  # an interrupt has left it
            self._end(self._local.forward)
        alive = {thread.ident for thread in threading.enumerate()}
        with self._lock:
            self._threads &= alive
        self._take_hooks_off()

    @property
    def current(self) -> ModelCall | None:
        """The call that this thread is at, if it is looked at."""
        forward = self._local.forward
        return None if forward is None or not forward.looked_at else forward

    def show_operators(self, forward: ModelCall) -> None:
        """Show the operators of a call from here on."""
        forward.by_hooks, forward.uneventful = False, ()
        forward.mode = _Mode(self, forward)
        # not by entering it: that notes in flags of the whole process that a mode is on, which is no thread's alone
        push_dispatch_mode(forward.mode)

    def look(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method that only looks: without gradients, without being seen, and not during a backward pass.

        A backward pass runs forwards again where activations are checkpointed; what they meet has been seen before.
        """
        if _looking.busy or self.closed or in_backward():
            return
        _looking.busy = True
        learning = torch.is_grad_enabled()
        try:
            if learning:
                set_grad_enabled(False)
            method(*args)
        finally:
            if learning:
                set_grad_enabled(True)
            _looking.busy = False

    def _enter(self, module: Module, args: tuple[Any, ...]) -> None:
        # Between two modules a network has emptied the caches, of Python's code too: what is needless must not be done.
        forward = self._local.forward
        if forward is not None and not forward.looked_at and module is not forward.root and module is not self._model:
            return
        if self.closed and (forward is None or module is forward.root):  # the second: an interrupt has left it
            if forward is not None:
                self._end(forward)
            self._take_hooks_off()
            return
        name = self._names.get(id(module))
        if name is None:
            name = self._names.get(id(module.__dict__.get("_forward_hooks")))
        if name is None or in_backward():
            return
        if forward is not None and (module is forward.root or module is self._model):
            self._end(forward)  # whatever an interrupt has left
            forward = None
        if forward is None:
            forward = self._begin(module, name, args)
        if forward.looked_at:
            number = forward.entered
            forward.entered = number + 1
            running = RunningModule(module, name, args, number)
            forward.running.append(running)
            if number >= len(forward.uneventful) or forward.uneventful[number] != name:
                self.entered(forward, running)

    def _leave(self, module: Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self._local.forward
        if forward is None:
            return
        is_root = module is forward.root
        if not (is_root or forward.looked_at) or in_backward():
            return
        stack = forward.running
        if (stack and stack[-1].module is module) or any(running.module is module for running in stack):
            while (running := stack.pop()).module is not module:
                pass
            if output is not None and not running.seen and running.name in self._unseen:
                self.look(self.left_unseen, forward, running)
        if is_root:
            self._end(forward, complete=output is not None)
            if self.closed and output is not None:
                # after an exception torch goes through the hooks themselves, which must not change under it
                self._take_hooks_off()

    def _begin(self, module: Module, name: str, args: tuple[Any, ...]) -> ModelCall:
        forward = self.begin(module, name, args)
        with self._lock:
            self._threads.add(threading.get_ident())
        self._local.forward = forward
        if forward.looked_at:
            if not forward.by_hooks:
                self.show_operators(forward)
            self.begun(forward)
        return forward

    def _end(self, forward: ModelCall, complete: bool = False) -> None:
        # what says that there is something to end is taken away last: after an interrupt in here it is ended again
        if forward.looked_at:
            self.ended(forward, complete)
        forward.looked_at = False
        if forward.mode is not None:
            _take_off(forward.mode)
        forward.mode = None
        with self._lock:
            self._threads.discard(threading.get_ident())
        self._local.forward = None

    def _take_hooks_off(self) -> None:
        with self._lock:
            if self.closed and not self._threads:
                while self._hooks:
                    self._hooks[-1].remove()
                    self._hooks.pop()


class _Mode(OperatorMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while it is on, and torch's guard against that costs more than all the rest

    def __init__(self, forwards: ModuleHooks, forward: ModelCall) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._forwards = forwards
        self._forward = forward

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._forwards.operator(self._forward, func, args, kwargs)
        return func(*args, **kwargs)


def _take_off(mode: OperatorMode) -> None:
    """Take a mode off this thread, from under those that were put on later; nothing happens if it is not on."""
    if mode not in dispatch_modes():
        return
    above = []
    while (top := pop_dispatch_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        push_dispatch_mode(other)
