"""What verbs borrow of the whole process or thread, noted so that it can be put back whatever went wrong.

A ``with`` block gives back what it borrowed, except where an interrupt meets the first line of what ends it.
"""

from __future__ import annotations

import torch
from torch.overrides import _pop_mode as _pop_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from batchnorm.models.calling import compiled_modules_eager

__all__ = ["ProcessState"]


class ProcessState:
    """Gradient mode, the stacks of dispatch and function modes, and the stance of the compiler, as they are now."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._dispatch = len(_get_current_dispatch_mode_stack())
        self._functions = torch._C._len_torch_function_stack()
        self._eager = compiled_modules_eager.depth()

    def restore(self) -> None:
        """Put all of it back; what other threads have borrowed stays."""
        while len(_get_current_dispatch_mode_stack()) > self._dispatch:
            _pop_mode()
        while torch._C._len_torch_function_stack() > self._functions:
            _pop_function_mode()
        torch._C._set_grad_enabled(self._grad)
        compiled_modules_eager.leave_to(self._eager)
