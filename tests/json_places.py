"""Data of JSON with something else in one of its places: what a file may hold that anybody has written."""

from __future__ import annotations

import copy
import json
from typing import Any

__all__ = ["MISSING", "paths_in", "put"]

MISSING = "missing"
"""In the place of a text: the place is left out."""


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the keys and numbers that lead to each place in dicts and lists, the whole of it first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in paths_in(item, (*path, key)))]


def put(about: Any, path: tuple[Any, ...], text: str) -> str:
    """Return the data as JSON with another text in one place, or without that place."""
    changed = value = copy.deepcopy(about)
    for key in path[:-1]:
        value = value[key]
    if text == MISSING:
        del value[path[-1]]
        return json.dumps(changed)
    value[path[-1]] = "@"
    return json.dumps(changed).replace('"@"', text)
