"""What verbs borrow of the whole process or thread, noted so that it can be put back whatever went wrong.

A ``with`` block gives back what it borrowed, except where an interrupt meets the first line of what ends it.
"""

from __future__ import annotations

import torch

from batchnorm.models.calling import compiled_modules_eager
from batchnorm.observers import dispatch_modes, function_modes, pop_dispatch_mode, pop_function_mode, set_grad_enabled

__all__ = ["ProcessState"]


class ProcessState:
    """Gradient mode, the stacks of dispatch and function modes, and the stance of the compiler, as they are now."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._dispatch = len(dispatch_modes())
        self._functions = len(function_modes())
        self._eager = compiled_modules_eager.depth()

    def restore(self) -> None:
        """Put all of it back; what other threads have borrowed stays."""
        while len(dispatch_modes()) > self._dispatch:
            pop_dispatch_mode()
        while len(function_modes()) > self._functions:
            pop_function_mode()
        set_grad_enabled(self._grad)
        compiled_modules_eager.leave_to(self._eager)
