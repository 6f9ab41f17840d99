"""What a verb asks of the model it is given, before it does anything."""

from __future__ import annotations

from typing import Any

from torch.jit import ScriptModule
from torch.nn import Module
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentTypeError, StateError

__all__ = ["lazy_names", "require_module", "require_readable"]


def lazy_names(module: Module) -> list[str]:
    """Return the names of the parameters and buffers that have no value until the first forward."""
    return [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]


def require_module(verb: str, model: Any) -> None:
    """Refuse what is no module.

    Raises:
        ArgumentTypeError: ``model`` is something else.
    """
    if not isinstance(model, Module):
        raise ArgumentTypeError(f"{verb}: expected a torch.nn.Module; got {type(model).__name__}.")


def require_readable(verb: str, model: Any) -> None:
    """Refuse a model whose dataflow cannot be read, or would not be what it is after the first run.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        StateError: it is lazy, and a run would initialize it for good; or scripted, with modules that cannot be told
            apart or edited. (A scripted part of a model is no obstacle.)
    """
    require_module(verb, model)
    lazy = lazy_names(model)
    if lazy:
        raise StateError(f"{verb}: {lazy[0]} has no value yet. Run the model once on real inputs first.")
    if isinstance(model, ScriptModule):
        raise StateError(f"{verb}: the model is scripted and cannot be edited. Pass the model that it was made from.")
