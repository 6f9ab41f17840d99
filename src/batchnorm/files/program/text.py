"""The text of a program, as data: which strings in it become code when it is loaded or run, and what they may be.

``torch.export`` makes Python of a file's text: of the names of its values, of the formulas of its sizes, of its guards;
it imports modules that the structure of the inputs names, and looks up functions by their names. So every string has to
be of a kind that is known; one of an unknown kind has to be a plain word.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from batchnorm.errors import InputError
from batchnorm.files.program.expressions import is_guard, is_size
from batchnorm.files.program.operators import is_operator

__all__ = ["PICKLED", "UntrustedError", "look_into_config", "look_into_graph"]


class UntrustedError(InputError):
    """A file holds what could run code, or what no program needs."""


PICKLED = "which only unpickling would read, and that can run any code"

_WORD = re.compile(r"[\w.+-]*", re.ASCII)
_FACTORIES = ("list", "dict", "set", "tuple", "int", "float", "str", "bool")


def _is_word(text: str) -> bool:
    return _WORD.fullmatch(text) is not None


def _is_identifier(text: str) -> bool:
    return not text or (text.isidentifier() and text.isascii())


def _is_quotable(text: str) -> bool:
    """Whether a text stays one between quotes."""
    return text.isprintable() and not set(text) & set("\"'\\")


def _is_anything(text: str) -> bool:
    return True


_NAME = (_is_identifier, "{} as a name, which is none in Python")
_STRINGS: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "expr_str": (is_size, "as a size, {}, which is no arithmetic on sizes"),
    "guards_code": (is_guard, "as a condition, {}, which is none on the sizes of inputs"),
    "target": (is_operator, "a call of {}, which is no operator of torch's"),
    "as_operator": (is_operator, "a call of {}, which is no operator of torch's"),
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _NAME),
    **dict.fromkeys(
        ("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"),
        (_is_quotable, "{} as the name of a layer or parameter"),
    ),
    # constants among the inputs of the program become part of its guards
    "as_string": (_is_quotable, "the text {} as an input"),
    "torch_version": (_is_anything, ""),
}
_KEYS: Mapping[str, tuple[Callable[[str], bool], str]] = {
    **dict.fromkeys(
        ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"),
        _NAME,
    ),
    "range_constraints": (is_size, "as a size, {}, which is no arithmetic on sizes"),
    "config": (_is_quotable, "{} as the name of a parameter"),
    "treespec_namedtuple_fields": (_is_quotable, "{} as the name of a type"),
}
_OBJECTS = ("custom_obj", "as_custom_obj", "custom_obj_values")


def look_into_graph(data: bytes) -> None:
    """Look at the text of a program.

    Raises:
        UntrustedError: it holds something else than operators on tensors.
    """
    _look("", _parsed(data), _STRINGS)


def look_into_config(data: bytes, prefix: str, empty: Collection[str]) -> None:
    """Look at the list of the tensors that stand in an archive.

    Args:
        data: the list.
        prefix: what the names of their records start with.
        empty: names of the records that hold nothing: torch would make zeros in any size that the list tells.

    Raises:
        UntrustedError: one of them is to be unpickled.
    """
    config = _parsed(data)
    _look("", config, _STRINGS)
    entries = config.get("config")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(entry, dict) or entry.get("use_pickle") or entry.get("tensor_meta") is None:
            raise UntrustedError(f"{name!r} as a pickled object, {PICKLED}")
        if not str(entry.get("path_name")).startswith(prefix):
            raise UntrustedError(f"{name!r} as an object of a class of its own, in {entry.get('path_name')!r}")
        sizes = entry["tensor_meta"].get("sizes") if isinstance(entry["tensor_meta"], dict) else None
        if entry.get("path_name") in empty and {"as_int": 0} not in (sizes or []):
            raise UntrustedError(f"{name!r} without its values")


def _parsed(data: bytes) -> Any:
    try:
        parsed = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UntrustedError("a part that is no JSON") from error
    if not isinstance(parsed, dict):
        raise UntrustedError("a part that is no JSON object")
    return parsed


def _look(key: str, value: Any, strings: Mapping[str, tuple[Callable[[str], bool], str]]) -> None:
    """Look at a value, and at all that is in it.

    Args:
        key: the last name on the way to it.
        value: what stands there.
        strings: by name, what strings may be, and what is said of others.
    """
    if isinstance(value, str):
        if key in ("in_spec", "out_spec"):
            _look_into_structure(value, is_input=key == "in_spec")
            return
        holds, otherwise = strings.get(key, (_is_word, f"{{}} as its {_short(key)}"))
        if not holds(value):
            raise UntrustedError(otherwise.format(_short(value)))
    elif isinstance(value, list):
        for item in value:
            _look(key, item, strings)
    elif isinstance(value, dict):
        _look_into(key, value, strings)


def _look_into(key: str, entries: dict[str, Any], strings: Mapping[str, tuple[Callable[[str], bool], str]]) -> None:
    holds, otherwise = _KEYS.get(key, (_is_word, "an entry of the name {}"))
    for name, value in entries.items():
        if not holds(name):
            raise UntrustedError(otherwise.format(_short(name)))
        if name in _OBJECTS and value:
            raise UntrustedError(f"an object of a class of its own, {PICKLED}")
        if name == "metadata" and key not in _KEYS:  # where a value comes from: shown at most
            if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
                raise UntrustedError("notes that are no text")
            continue
        inner = strings
        if key == "nodes" and name == "inputs":  # arguments, which are quoted
            inner = {**strings, "as_string": (_is_anything, ""), "as_strings": (_is_anything, "")}
        _look(name, value, inner)


def _look_into_structure(text: str, is_input: bool) -> None:
    """Look at how inputs or outputs are nested: text within the text, in which a module to import may be named."""
    specs = _loaded(text)
    if not isinstance(specs, list):
        raise UntrustedError(f"inputs or outputs of an unknown structure, {_short(text)}")
    for spec in specs[1:]:
        _look_into_level(spec, is_input)
        children = _children(spec) if is_input else []
        if len(children) == 2 and isinstance(children[1], dict) and children[1].get("type") == "builtins.dict":
            names = _loaded(children[1].get("context") or "[]")
            if not isinstance(names, list) or not all(isinstance(n, str) and _is_identifier(n) for n in names):
                raise UntrustedError("a keyword argument that is no name in Python")


def _look_into_level(spec: Any, is_input: bool) -> None:
    if not isinstance(spec, dict) or not (spec.get("type") is None or _is_word(str(spec["type"]))):
        raise UntrustedError(f"inputs or outputs of an unknown structure, {_short(str(spec))}")
    context = spec.get("context")
    if isinstance(context, str):
        with contextlib.suppress(ValueError):  # some types have text of another kind
            context = json.loads(context)
    _look_into_context(context, is_input)
    for child in _children(spec):
        _look_into_level(child, is_input)


def _children(spec: Any) -> list[Any]:
    children = spec.get("children_spec") if isinstance(spec, dict) else None
    return children if isinstance(children, list) else []


def _look_into_context(context: Any, is_input: bool) -> None:
    if isinstance(context, str):
        if is_input and not _is_quotable(context):
            raise UntrustedError(f"{_short(context)} as the name of an input")
    elif isinstance(context, list):
        for item in context:
            _look_into_context(item, is_input)
    elif isinstance(context, dict):
        if "__enum__" in context or "fqn" in context:
            raise UntrustedError(
                "an enumeration among the names of inputs or outputs, for which a module would be imported"
            )
        module, factory = (context.get(f"default_factory_{part}") for part in ("module", "name"))
        if (module, factory) != (None, None) and not (module == "builtins" and factory in _FACTORIES):
            raise UntrustedError(f"an import of {_short(f'{module}.{factory}')}, to make what a dictionary lacks")
        for name, value in context.items():
            _look_into_context(name, is_input)
            _look_into_context(value, is_input)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UntrustedError(f"inputs or outputs of an unknown structure, {_short(text)}") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
