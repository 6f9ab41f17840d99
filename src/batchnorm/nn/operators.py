"""Operators as a dispatch mode meets them: which are batch norms, and what each was given, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["NORM_OPERATORS", "named_arguments"]

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


def named_arguments(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of a call by its name in the schema, defaults filled in."""
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given |= {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    return {**given, **kwargs}
