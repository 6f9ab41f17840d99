r"""Text from files and models made harmless, before it reaches a terminal or a page.

Whoever names an array in a file, or a layer, also chooses the characters: those that move the cursor or set the title
of a terminal, that end a line so that the rest passes for a message of its own, that turn the direction of writing
around, or that nobody sees. They are shown as Python writes them in a string: ``\x1b``, ``\n``, ``\u202e``.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Any

__all__ = ["harmless", "harmless_data"]

_HARMFUL = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: control, format, surrogate, line and paragraph separator."""


def harmless(text: str, *, lines: bool = False) -> str:
    r"""Return a text with every character that does something shown instead.

    Args:
        text: any.
        lines: whether ends of lines, and tabs, are meant.

    >>> harmless("bn\x1b[2J\nerror: forged")
    'bn\\x1b[2J\\nerror: forged'
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or unicodedata.category(c) not in _HARMFUL else _shown(c) for c in text)


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def harmless_data(value: Any) -> Any:
    r"""Return the same data, dataclasses and containers, with every text in it made harmless.

    >>> harmless_data({"name": ["a", 1.5, ("b\r",)]})
    {'name': ['a', 1.5, ('b\\r',)]}
    """
    if isinstance(value, str):
        return harmless(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: harmless_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {harmless_data(key): harmless_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(harmless_data, value)) if type(value) in (list, tuple) else value
    return value
