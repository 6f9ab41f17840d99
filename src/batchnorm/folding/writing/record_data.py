"""What the text in a file of pairs has to be: anybody can write one whose checksum is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from batchnorm.errors import BatchNormError, InputError, StateError

__all__ = ["fitting", "read_about"]

_Holds = Callable[[Any], bool]


def read_about(path: Any, text: str, tensors: Collection[str]) -> dict[str, Any]:
    """Return the text in a file of pairs as data, all of whose parts are there, of their types, and fit together.

    Args:
        path: of the file, for the message.
        text: what stands in it beside the tensors.
        tensors: their names.

    Raises:
        InputError: a part is missing, or is something else.
    """
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise _other(path, "its text is no JSON object")
    for part, holds in _PARTS.items():
        if not holds(about.get(part)):
            raise _other(path, f"its part {part!r} is {'missing' if part not in about else 'of another form'}")
    firsts = set(about["same"].values())
    if not firsts <= set(about["norms"]) & set(about["stays"]) or not set(about["norms"]) <= firsts:
        raise _other(path, "its norms are not those that its names stand for")
    of_parameters = {name.removeprefix("parameters/") for name in tensors if name.startswith("parameters/")}
    if of_parameters & set(about["added"]):
        raise _other(path, "a parameter is there that folding is said to have added")
    return about


@contextmanager
def fitting(verb: str) -> Iterator[None]:
    """Say of what fails in the body that the pairs are another model's: they name places that this one has not.

    Raises:
        StateError: in the place of the errors of Python and torch.
    """
    try:
        yield
    except BatchNormError:
        raise
    except (LookupError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), "")[:200].rstrip(".")
        raise StateError(
            f"{verb}: the pairs do not go with this model ({type(error).__name__}: {said}). Pass those of its own fold."
        ) from error


def _other(path: Any, why: str) -> InputError:
    return InputError(f"{path}: expected the pairs of a fold, which FoldResult.save_pairs writes; {why}.")


def _is_name(value: Any) -> bool:
    """Whether it is the name of a module; the model itself has an empty one."""
    return isinstance(value, str) and (not value or all(value.split(".")))


def _is_parameter(value: Any) -> bool:
    return isinstance(value, str) and all(value.split("."))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _or_none(holds: _Holds) -> _Holds:
    return lambda value: value is None or holds(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(holds: _Holds) -> _Holds:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _by_name(holds: _Holds, names: _Holds = _is_name) -> _Holds:
    return lambda value: isinstance(value, dict) and all(names(key) and holds(item) for key, item in value.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_NORM: Mapping[str, _Holds] = {
    "class": _is_text,
    "num_features": _or_none(_is_size),
    "eps": _or_none(_is_number),
    "momentum": _or_none(_is_number),
    "affine": _or_none(_is_bool),
    "track_running_stats": _or_none(_is_bool),
}


def _is_norm(value: Any) -> bool:
    return isinstance(value, dict) and all(key in value and holds(value[key]) for key, holds in _NORM.items())


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value) or _list_of(_is_size)(value)


def _is_part(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value.get("class") if isinstance(value, dict) else None, str)
                                      and all(map(_is_setting, value.values())))  # fmt: skip


_PARTS: Mapping[str, _Holds] = {
    "added": _by_name(_list_of(_is_size), _is_parameter),
    "norms": _by_name(_is_norm),
    "stays": _by_name(_list_of(_is_part)),
    "same": _by_name(_is_name),
    "digests": _by_name(_is_text, _is_parameter),
    "bordered": _list_of(_is_name),
    "ties": _by_name(_is_parameter, _is_parameter),
    "moved": _by_name(_is_name),
}
