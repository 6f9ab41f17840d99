"""Modules put in the places of others, the whole model among them."""

from __future__ import annotations

from torch.nn import Module

from batchnorm.errors import StateError

__all__ = ["become", "put_module", "twin"]


def put_module(model: Module, name: str, module: Module) -> None:
    """Put a module under a qualified name; the model itself, which has none, becomes what the module is."""
    if not name:
        become(model, module)
        return
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


def become(module: Module, other: Module) -> None:
    """Give a module the class and the contents of another one, since whoever holds it cannot be given that one.

    Raises:
        StateError: Python cannot change its class to that.
    """
    try:
        module.__class__ = type(other)
    except TypeError as error:
        raise StateError(
            f"{type(module).__name__}, the model itself, cannot become a {type(other).__name__} in place ({error}). "
            "Put it into a torch.nn.Sequential, in which another module can take its place."
        ) from error
    module.__dict__ = dict(other.__dict__)


def twin(module: Module, kind: type[Module] | None = None) -> Module:
    """Return a module with the same contents in registers of its own, of another class if one is given."""
    kind = type(module) if kind is None else kind
    other = kind.__new__(kind)
    other.__dict__ = {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    return other
