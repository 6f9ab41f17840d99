"""Norms with the same explanation, found by their sentences: a terminal shows one of them, and how many there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

__all__ = ["group_by_sentence"]

_WORD = re.compile(r"\d+ of \d+|\w+(?:\.\w+)*")
# of several operators in a row, "cat in …, cat in … and 3 more", one is enough
_REPEATED = re.compile(r"((?:\w+ in )?…)(?:(?:, | and )(?:\1|\d+ more))+")

Item = TypeVar("Item")


def group_by_sentence(items: Sequence[Item], says: Callable[[Item], str], names: Collection[str]) -> list[list[Item]]:
    """Return the items in groups of which the same is said, but for names; in the order in which they first come.

    Args:
        items: anything.
        says: what is said of one, as sentences.
        names: what is a name in these; so is a word with a dot inside, and how many of how many.

    Example:
        >>> group_by_sentence(["It reads a.", "It stays.", "It reads b."], str, {"a", "b"})
        [['It reads a.', 'It reads b.'], ['It stays.']]
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(_without_names(says(item), names), []).append(item)
    return list(groups.values())


def _without_names(text: str, names: Collection[str]) -> str:
    def blank(match: re.Match[str]) -> str:
        return "…" if {".", " "} & set(match[0]) or match[0] in names else match[0]

    return _REPEATED.sub(r"\1", _WORD.sub(blank, text))
