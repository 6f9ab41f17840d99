"""Hooks on all modules there are, so that nothing is written into a model that is looked at."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from batchnorm.blocks import undone
from batchnorm.models.transaction import on_failure

__all__ = ["module_hooks"]


@contextmanager
def module_hooks(enter: Callable[..., None], leave: Callable[..., None], *, kwargs: bool = False) -> Iterator[None]:
    """Call ``enter`` before each forward of a module and ``leave`` after it, while the context lasts.

    A compiled module warns of hooks on all modules, which are not the user's; where warnings are errors its forward
    would fail.

    Args:
        enter: takes the module and its positional arguments.
        leave: takes the module, its positional arguments, its keyword arguments if ``kwargs``, and its output.
        kwargs: see ``leave``.
    """
    handles: list[RemovableHandle] = []

    def hook() -> None:
        # map, so that no interrupt can come between a hook and its handle here
        handles.extend(map(register_module_forward_pre_hook, [enter]))
        handles.extend(map(partial(register_module_forward_hook, with_kwargs=kwargs), [leave]))

    def unhook() -> None:
        for handle in handles:
            handle.remove()
            # torch's handle leaves the mark of with_kwargs behind, which torch.compile takes for a hook
            _global_forward_hooks_with_kwargs.pop(handle.id, None)

    on_failure(unhook)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
        yield from undone(hook, unhook)
