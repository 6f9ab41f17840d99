"""Tells, in every thread, which module of a model is running, and shows the operators that run in it.

Module hooks tell whose forward is running; they are global ones, so that nothing is written into the model. A dispatch
mode meets every operator, but only in the thread that it is put on: it is put on where a call of the model begins, and
taken off where that ends.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode

__all__ = ["Forward", "Forwards", "Running"]


@dataclass
class Running:
    """A module whose forward is running, and whether it has been seen to normalize."""

    module: Module
    name: str
    seen: bool = False


@dataclass(eq=False)
class Forward:
    """One call of the model, or of a part of it, in one thread.

    Attributes:
        root: the module that was called.
        running: the modules of the model whose forwards are running, the outermost first.
        mode: shows the operators; None where this call is passed over.
    """

    root: Module
    running: list[Running] = field(default_factory=list)
    mode: TorchDispatchMode | None = None


class _Local(threading.local):
    forward: Forward | None = None


class _Looking(threading.local):
    """Whether something is being measured in this thread: nobody is to watch that, whoever measures."""

    busy = False


_looking = _Looking()


class Forwards(ABC):
    """Follows the calls of a model from :meth:`open` to :meth:`close`, in all threads.

    A call that runs at :meth:`close` in another thread is followed to its end; the last one to end takes the hooks off.

    Args:
        model: whose calls are followed; each call of it, or of a module in it where it is not running itself.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
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
    def begin(self, root: Module, name: str, args: tuple[Any, ...]) -> tuple[Forward, bool]:
        """Return the record of a call that begins, and whether its operators are looked at."""

    @abstractmethod
    def operator(self, forward: Forward, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operator that is about to run."""

    @abstractmethod
    def entered(self, forward: Forward, running: Running, args: tuple[Any, ...]) -> None:
        """Look at a module that begins."""

    @abstractmethod
    def left(self, forward: Forward, running: Running, args: tuple[Any, ...], output: Any) -> None:
        """Look at a module that has ended, with an output or with an exception (no output)."""

    @abstractmethod
    def begun(self, forward: Forward) -> None:
        """Prepare this thread for a call that is looked at."""

    @abstractmethod
    def ended(self, forward: Forward) -> None:
        """Take back what :meth:`begun` did."""

    # -- from here on what is the same for all ---------------------------------------------------------------------

    def open(self) -> None:
        """Begin to follow."""
        with self._lock:
            self.closed = False
            if not self._hooks:
                self._hooks = [
                    register_module_forward_pre_hook(self._enter),
                    register_module_forward_hook(self._leave, always_call=True),
                ]

    def close(self) -> None:
        """Follow no more calls but those that are running in other threads."""
        self.closed = True
        if self._local.forward is not None:  # an interrupt has left it
            self._end(self._local.forward)
        alive = {thread.ident for thread in threading.enumerate()}
        with self._lock:
            self._threads &= alive
        self._take_hooks_off()

    @property
    def current(self) -> Forward | None:
        """The call that this thread is at, if its operators are looked at."""
        forward = self._local.forward
        return None if forward is None or forward.mode is None else forward

    def look(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method that only looks: without gradients, without being seen, and not during a backward pass.

        A backward pass runs forwards again where activations are checkpointed; what they meet has been seen before.
        """
        if _looking.busy or self.closed or torch._C._current_graph_task_id() != -1:
            return
        _looking.busy = True
        learning = torch.is_grad_enabled()
        try:
            if learning:
                torch._C._set_grad_enabled(False)
            method(*args)
        finally:
            if learning:
                torch._C._set_grad_enabled(True)
            _looking.busy = False

    def _name_of(self, module: Module) -> str | None:
        name = self._names.get(id(module))
        return self._names.get(id(module.__dict__.get("_forward_hooks"))) if name is None else name

    def _enter(self, module: Module, args: tuple[Any, ...]) -> None:
        forward = self._local.forward
        if self.closed and (forward is None or module is forward.root):  # the second: an interrupt has left it
            if forward is not None:
                self._end(forward)
            self._take_hooks_off()
            return
        name = self._name_of(module)
        if name is None or torch._C._current_graph_task_id() != -1:
            return
        if forward is not None and (module is forward.root or module is self._model):
            self._end(forward)  # whatever an interrupt has left
            forward = None
        if forward is None:
            forward = self._begin(module, name, args)
        if forward.mode is not None:
            running = Running(module, name)
            forward.running.append(running)
            self.entered(forward, running, args)

    def _leave(self, module: Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self._local.forward
        if forward is None or torch._C._current_graph_task_id() != -1:
            return
        if any(running.module is module for running in forward.running):
            while (running := forward.running.pop()).module is not module:
                pass
            self.left(forward, running, args, output)
        if module is forward.root:
            self._end(forward)
            if self.closed and output is not None:
                # after an exception torch goes through the hooks themselves, which must not change under it
                self._take_hooks_off()

    def _begin(self, module: Module, name: str, args: tuple[Any, ...]) -> Forward:
        forward, looked_at = self.begin(module, name, args)
        with self._lock:
            self._threads.add(threading.get_ident())
        self._local.forward = forward
        if looked_at:
            forward.mode = _Mode(self, forward)
            # not by entering it: that notes in flags of the whole process that a mode is on, which is no thread's alone
            _push_mode(forward.mode)
            self.begun(forward)
        return forward

    def _end(self, forward: Forward) -> None:
        self._local.forward = None
        mode, forward.mode = forward.mode, None
        if mode is not None:
            self.ended(forward)
            _take_off(mode)
        with self._lock:
            self._threads.discard(threading.get_ident())

    def _take_hooks_off(self) -> None:
        with self._lock:
            if self.closed and not self._threads:
                hooks, self._hooks = self._hooks, []
                for hook in hooks:
                    hook.remove()


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while it is on, and torch's guard against that costs more than all the rest

    def __init__(self, forwards: Forwards, forward: Forward) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._forwards = forwards
        self._forward = forward

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._forwards.operator(self._forward, func, args, kwargs)
        return func(*args, **kwargs)


def _take_off(mode: TorchDispatchMode) -> None:
    """Take a mode off this thread, from under those that were put on later; nothing happens if it is not on."""
    if mode not in _get_current_dispatch_mode_stack():
        return
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
