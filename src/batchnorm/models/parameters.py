"""Parameters and buffers of a model by their qualified names."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module, Parameter

__all__ = ["find_tensor", "is_within", "put_parameter", "qualified"]


def qualified(module: str, name: str) -> str:
    """Return the name of something in a module of that name; the model itself has none.

    >>> qualified("layer1.0", "weight"), qualified("", "weight")
    ('layer1.0.weight', 'weight')
    """
    return f"{module}.{name}" if module else name


def is_within(name: str, module: str) -> bool:
    """Whether a name is that of something inside a module of that name: everything is inside the model.

    >>> is_within("layer1.0.weight", "layer1.0"), is_within("layer1.0", "layer1.0"), is_within("weight", "")
    (True, False, True)
    """
    return name.startswith(f"{module}.") if module else bool(name)


def find_tensor(model: Module, name: str | None) -> Tensor | None:
    """Return the parameter or buffer of that qualified name, None for no name or an empty place."""
    if name is None:
        return None
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]


def put_parameter(model: Module, name: str, parameter: Parameter | None) -> None:
    """Put a parameter, or an empty place for one, under a qualified name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = parameter
