"""Which modules of a model are norms, and which of them a name means."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import UnknownNameError, closest

__all__ = ["NormModule", "named_norms", "select_norms"]

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
        UnknownNameError: a name means no norm at all.
    """
    norms = named_norms(model)
    if names is None:
        return norms
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        found = {n for n in norms if n == name or n.startswith(f"{name}.") or fnmatchcase(n, name)}
        if not found:
            alias = _first_name_of_shared(model, name)
            found = {alias} if alias is not None else set()
        if not found:
            raise UnknownNameError(
                f"{name!r}: no norm of that name in {type(model).__name__}, which has {len(norms)} "
                f"norms{closest(name, norms)}."
            )
        chosen |= found
    return {name: norm for name, norm in norms.items() if name in chosen}


def _first_name_of_shared(model: Module, name: str) -> str | None:
    """Return the name under which ``named_norms`` lists the norm that ``name`` is a second name of."""
    every = dict(model.named_modules(remove_duplicate=False))
    return next((n for n, m in named_norms(model).items() if m is every.get(name)), None)
