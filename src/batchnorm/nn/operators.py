"""Operators as a dispatch mode meets them: which are batch norms, and what each was given, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

__all__ = ["NORM_OPERATORS", "bound_arguments", "eps_key", "is_norm_operator", "named_arguments"]

NORM_OPERATORS = frozenset(
    {
        "aten::batch_norm",
        "aten::native_batch_norm",
        "aten::cudnn_batch_norm",
        "aten::miopen_batch_norm",
        "aten::_batch_norm_impl_index",
        "aten::_batch_norm_no_update",
        "aten::_batch_norm_with_update",
        "aten::_batch_norm_with_update_functional",
        "aten::_native_batch_norm_legit",
        "aten::_native_batch_norm_legit_functional",
        "aten::_native_batch_norm_legit_no_training",
        "batchnorm::batch_norm",
    }
)
"""Those that normalize an input (N, C, ...) by a batch's statistics or by stored ones.

Modules call ``aten::batch_norm`` or this library's own; the others come from exported programs.
"""


@cache
def is_norm_operator(op: Any) -> bool:
    """Whether an operator is a batch norm, one of ``NORM_OPERATORS``; kept, for a schema is slow to read."""
    return hasattr(op, "_schema") and op._schema.name in NORM_OPERATORS


def eps_key(given: Mapping[str, Any]) -> str:
    """Return what a norm operator calls its eps, of which there are two names."""
    return "eps" if "eps" in given else "epsilon"


def named_arguments(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of an operator's call by its name in the schema, defaults filled in."""
    names, defaults = _parameters(op)
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def bound_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of a Python function's call by its name, defaults filled in."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@cache
def _parameters(op: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of an operator's parameters, and their defaults; kept, for a schema is slow to read."""
    arguments = op._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments}
