"""Lets others look at the calls of the operator ``batchnorm::batch_norm`` in the thread that they watch.

Above autograd the operator is taken apart before a dispatch mode could meet it, so it reports its calls itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Observer", "attach", "detach", "followed", "notify", "observed"]

Observer: TypeAlias = Callable[[Tensor, Tensor | None, Tensor | None, float, Tensor | None], None]
"""Called with input, running_mean, running_var, eps and mask before the call is served; it must not change them."""


class _Observers(threading.local):
    def __init__(self) -> None:
        self.all: tuple[Observer, ...] = ()


_observers = _Observers()


def attach(observer: Observer) -> None:
    """Call ``observer`` before each call of the operator in this thread, until it is detached in this thread."""
    _observers.all = (*_observers.all, observer)


def detach(observer: Observer) -> None:
    """Call it no more in this thread; nothing happens if it is not attached."""
    _observers.all = tuple(o for o in _observers.all if o != observer)


def notify(x: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float, mask: Tensor | None) -> None:
    """Tell the observers of this thread about a call."""
    for observer in _observers.all:
        observer(x, mean, variance, eps, mask)


def observed() -> bool:
    """Whether anybody watches this thread."""
    return bool(_observers.all)


def followed() -> bool:
    """Whether torch itself follows the operators of this thread: a compiler, a tracer, a transform or a mode."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
    )
