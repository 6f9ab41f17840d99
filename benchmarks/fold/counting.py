"""How many norms a callable runs, whatever wrote it: batch-norm operators, counted as torch dispatches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count_norms"]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # batch_norm itself is made of others; what arrives here is native_batch_norm and its kin, one a norm
        self.norms += "batch_norm" in func.name()
        return func(*args, **(kwargs or {}))


def count_norms(run: Callable[..., Any], *inputs: Any) -> int:
    """Return how many norms a call runs; what TorchScript's interpreter runs is seen too."""
    with _Counter() as counter, torch.no_grad():
        run(*inputs)
    return counter.norms
