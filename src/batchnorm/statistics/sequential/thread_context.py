"""What a model may depend on that belongs to a thread: taken here, set up there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch

from batchnorm.observers import function_modes

__all__ = ["ThreadContext"]


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] + ([] if accelerator is None else [accelerator.type])
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


@dataclass(frozen=True)
class ThreadContext:
    """The surroundings of the thread that made it: context variables, autocast, function modes (the default device).

    Dispatch modes are not among them: operators are run by the thread that made it.
    """

    context: Any = field(default_factory=copy_context)
    autocast: list[tuple[str, bool, torch.dtype]] = field(default_factory=_autocast)
    function_modes: list[Any] = field(default_factory=function_modes)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Set up the same in this thread, save the context variables, for which use ``context.run``."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # the cache would hold a copy of the weights for each thread
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            for mode in self.function_modes:
                stack.enter_context(mode)
            yield
