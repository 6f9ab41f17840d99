"""The form that data from an untrusted file must have: numbers, names, and lists and tables of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = [
    "Holds",
    "by_name",
    "is_bool",
    "is_count",
    "is_name",
    "is_number",
    "is_number_from_zero",
    "is_parameter",
    "is_size",
    "is_text",
    "list_of",
    "one_of",
    "or_none",
]

Holds: TypeAlias = Callable[[Any], bool]
"""Whether a value has a form."""


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_name(value: Any) -> bool:
    """Whether it is the name of a module; the model itself has an empty one."""
    return isinstance(value, str) and (not value or all(value.split(".")))


def is_parameter(value: Any) -> bool:
    """Whether it is the name of a parameter."""
    return isinstance(value, str) and all(value.split("."))


def is_bool(value: Any) -> bool:
    """Whether it is true or false."""
    return isinstance(value, bool)


def is_size(value: Any) -> bool:
    """Whether it is a whole number from 0 on, below what no tensor has."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def is_count(value: Any) -> bool:
    """Whether it is such a number, and not 0."""
    return is_size(value) and bool(value)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_number_from_zero(value: Any) -> bool:
    """Whether it is such a number, and not negative."""
    return is_number(value) and bool(value >= 0)


def or_none(holds: Holds) -> Holds:
    """Return whether a value has a form, or is None."""
    return lambda value: value is None or holds(value)


def one_of(*texts: str) -> Holds:
    """Return whether a value is one of these strings."""
    return lambda value: isinstance(value, str) and value in texts


def list_of(holds: Holds, length: int | None = None) -> Holds:
    """Return whether a value is a list of what has a form, of a length if one is given."""

    def is_list(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(holds, value))

    return is_list


def by_name(holds: Holds, names: Holds = is_name) -> Holds:
    """Return whether a value is a table of what has a form, by names."""
    return lambda value: isinstance(value, dict) and all(names(key) and holds(item) for key, item in value.items())
