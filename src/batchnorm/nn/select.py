"""Which modules of a model are norms, and which of them a name means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentTypeError, StateError, UnknownNameError, closest

__all__ = ["NormModule", "listed", "meant_by", "named_norms", "select_norms"]

# torch's private base class is what BatchNorm1d, 2d, 3d, SyncBatchNorm, the lazy ones, timm's and ours all share.
NormModule: TypeAlias = _BatchNorm


def named_norms(model: Module) -> dict[str, NormModule]:
    """Return every norm of ``model`` by its qualified name, in registration order; a shared one appears once.

    The model itself may be a norm: its name is then ``""``.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def select_norms(model: Module, names: str | Sequence[str] | None) -> dict[str, NormModule]:
    """Return the norms that ``names`` means.

    Args:
        model: any model.
        names: None for all of them; else one name or several: of a norm (``"layer1.0.bn1"``), of a module that holds
            norms (``"layer1"``), or a pattern (``"*.bn2"``).

    Raises:
        ArgumentTypeError: a name is no text.
        StateError: there is no name.
        UnknownNameError: a name means no norm at all.
    """
    norms = named_norms(model)
    if names is None:
        return norms
    chosen: set[str] = set()
    for name in listed(names):
        found = {n for n in norms if meant_by(name, n)} or _shared_under(model, name)
        if not found:
            raise UnknownNameError(
                f"{name!r}: no norm of that name in {type(model).__name__}, which has {len(norms)} "
                f"norm{'s' * (len(norms) != 1)}{closest(name, norms) or '.'}"
            )
        chosen |= found
    return {name: norm for name, norm in norms.items() if name in chosen}


def listed(names: str | Sequence[str]) -> list[str]:
    """Return one name or several as a list.

    Raises:
        ArgumentTypeError: a name is no text.
        StateError: there is none.
    """
    several = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    for name in several:
        if not isinstance(name, str):
            raise ArgumentTypeError(
                f"names: expected the names of norms, as model.named_modules() gives them; got {type(name).__name__}."
            )
    if not several:
        raise StateError("names is empty, so that no norm is meant. Leave it out to mean all of them.")
    return several


def meant_by(name: str, norm: str) -> bool:
    """Return whether ``name`` means the norm called ``norm``: its own name, that of a module above it, or a pattern."""
    return norm == name or norm.startswith(f"{name}.") or fnmatchcase(norm, name)


def _shared_under(model: Module, name: str) -> set[str]:
    """Return the norms that ``name`` means by a second name: theirs, or that of a shared module that holds them."""
    every = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    chosen = {id(m) for n, m in every if meant_by(name, n)}
    return {n for n, m in named_norms(model).items() if id(m) in chosen}
