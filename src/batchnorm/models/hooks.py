"""Who watches a module's runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

__all__ = ["hooks_of"]


def hooks_of(module: Module) -> Mapping[str, tuple[Mapping[int, Any], ...]]:
    """Return the kinds of hooks that a module has on its runs, with the registers of those; none that is empty."""
    kinds = {
        "forward": (module._forward_hooks, module._forward_pre_hooks),
        "backward": (module._backward_hooks, module._backward_pre_hooks),
    }
    return {kind: registers for kind, registers in kinds.items() if any(registers)}
