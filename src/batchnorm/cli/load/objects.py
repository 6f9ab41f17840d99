"""``package.module:name`` on the command line: find the object, and call it when it is a factory."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchnorm.cli.errors import CommandError, reason
from batchnorm.errors import closest

__all__ = ["call_factory", "find_object", "import_from_here"]


def import_from_here() -> None:
    """Let modules of the current directory be imported, as ``python -m`` does but a console script does not."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def find_object(option: str, spec: str) -> Any:
    """Return the object that ``spec`` (``package.module:name``) means.

    Raises:
        CommandError: the spec has another form, the module is missing or fails, or it has no such name.
    """
    module_name, colon, attribute = spec.partition(":")
    parts = module_name.split(".") + attribute.split(".")
    if not colon or module_name.endswith(".py") or not all(part.isidentifier() for part in parts):
        raise CommandError(
            f"{option} {spec}: expected MODULE:NAME, such as net:build for build() of ./net.py{_like_module(spec)}."
        )
    found = _import(option, module_name)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            known = _own_names(found)
            where = getattr(found, "__file__", None) or type(found).__name__
            raise CommandError(
                f"{option} {spec}: {where} has no {part!r}{closest(part, known) or _names(known)}"
            ) from None
    return found


def call_factory(option: str, spec: str, factory: Callable[..., Any]) -> Any:
    """Return what the factory returns, called without arguments.

    Raises:
        CommandError: it needs arguments, or it raises.
    """
    _requires_no_arguments(option, spec, factory)
    try:
        return factory()
    except Exception as error:
        raise CommandError(f"{option} {spec}: the call {spec.partition(':')[2]}() raised {reason(error)}.") from error
    except SystemExit as error:
        raise CommandError(f"{option} {spec}: the call ended the program ({reason(error)}).") from error


def _requires_no_arguments(option: str, spec: str, factory: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some built-ins have none; the call itself will tell
        return
    try:
        signature.bind()
    except TypeError:
        needed = [
            p.name
            for p in signature.parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        raise CommandError(
            f"{option} {spec}: it needs arguments ({', '.join(needed)}), and the command line gives none; "
            "name a function that calls it with them."
        ) from None


def _import(option: str, module_name: str) -> Any:
    import_from_here()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise CommandError(
                f"{option} {module_name}: no module {missing!r} in {Path.cwd()} or among the installed packages "
                f"of {sys.executable}."
            ) from error
        raise CommandError(f"{option} {module_name}: importing it failed, {reason(error)}.") from error
    except Exception as error:
        raise CommandError(f"{option} {module_name}: importing it raised {reason(error)}.") from error
    except SystemExit as error:
        raise CommandError(
            f"{option} {module_name}: importing it ended the program ({reason(error)}); put what the script does "
            'when run under: if __name__ == "__main__".'
        ) from error


def _own_names(found: object) -> list[str]:
    """Return what a module itself defines, or an object has; not what a module imports."""
    names = [name for name in dir(found) if not name.startswith("_")]
    if not inspect.ismodule(found):
        return names

    def is_own(value: object) -> bool:
        if inspect.isclass(value) or inspect.isroutine(value):
            return getattr(value, "__module__", None) in (found.__name__, None)
        return not inspect.ismodule(value)

    return [name for name in names if is_own(getattr(found, name, None))]


def _names(known: list[str]) -> str:
    shown = ", ".join(known[:5])
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f"; it has {shown}{more}" if known else ""


def _like_module(spec: str) -> str:
    """Return a hint for a path where a module's name belongs: ``"; did you mean nets.small:build?"``."""
    path, _, name = spec.partition(":")
    if not path.endswith(".py"):
        return ""
    dotted = ".".join(Path(path[: -len(".py")]).parts)
    return f"; did you mean {dotted}:{name or 'build'}?"
