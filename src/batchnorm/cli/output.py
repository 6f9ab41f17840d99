"""Where things go: the result to stdout, everything else to stderr, files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from batchnorm.cli.errors import CommandError, reason
from batchnorm.files.replace import replacing as _replacing
from batchnorm.report.result import Result, finite_or_none

__all__ = [
    "STATE_SUFFIXES",
    "check_destinations",
    "check_folder",
    "note",
    "only_result_on_stdout",
    "page",
    "print_json",
    "print_result",
    "publish",
    "replacing",
    "telling",
]

STATE_SUFFIXES = (".safetensors", ".pt", ".pth")


def note(text: str) -> None:
    """Tell the user something beside the result, on stderr."""
    print(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def only_result_on_stdout() -> Iterator[None]:
    """Send to stderr what the user's own code prints, so that stdout holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def check_destinations(
    output: Path | None, html: Path | None, suffixes: Sequence[str] = STATE_SUFFIXES, *, option: str = "--output"
) -> None:
    """Find out before the work whether its results can be written.

    Raises:
        CommandError: another suffix, no such folder, or no right to write there.
    """
    if output is not None:
        _check_file(option, output, suffixes)
    if html is not None:
        _check_file("--html", html, (".html", ".htm"))


def check_folder(option: str, path: Path) -> None:
    """Find out before the work whether a folder is there or can be made.

    Raises:
        CommandError: a file is in its place, or there is no right to write there.
    """
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise CommandError(f"{option} {path}: expected a folder; {there} is a file.")
    if not os.access(there, os.W_OK):
        raise CommandError(f"{option} {path}: no right to write in {there}.")


def _check_file(option: str, path: Path, suffixes: Sequence[str]) -> None:
    if path.suffix not in suffixes:
        expected = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
        raise CommandError(
            f"{option} {path}: expected a name that ends in {expected}; got {path.suffix or 'no suffix'}."
        )
    if path.is_dir():
        raise CommandError(f"{option} {path}: expected a file; this is a directory.")
    if not path.parent.is_dir():
        raise CommandError(f"{option} {path}: no directory {path.parent}; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{option} {path}: no right to write in {path.parent}.")


@contextlib.contextmanager
def replacing(option: str, path: Path) -> Iterator[Path]:
    """Yield the path of a file to write in the place of ``path``; see :func:`batchnorm.files.replace.replacing`.

    Raises:
        CommandError: the disk is full, or the system refuses otherwise.
    """
    try:
        with _replacing(path) as fresh:
            yield fresh
    except OSError as error:
        raise CommandError(f"{option} {path}: cannot be written ({error.strerror or error}).") from error


@contextlib.contextmanager
def telling(option: str, path: Path) -> Iterator[None]:
    """Say of an error in the body that the file cannot be written: C++ and Rust have their own for a full disk.

    Raises:
        CommandError: in its place.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise CommandError(f"{option} {path}: cannot be written ({reason(error)}).") from error


def publish(
    result: Result, *, json_: bool = False, html: Path | None = None, output: Path | None = None, **more: Any
) -> None:
    """Show a result the way it was asked for; ``html`` and ``output`` are the files written beside it."""
    if json_:
        print_json(result.to_dict() | more | {"output": _name(output), "html": _name(html)})
    else:
        print_result(result)
        for path in filter(None, (output, html)):
            note(f"wrote {path}.")


@contextlib.contextmanager
def page(result: Result, path: Path | None) -> Iterator[None]:
    """Write the report as a page, if a path is given; it takes its place only if the body ends well."""
    if path is None:
        yield
        return
    with replacing("--html", path) as fresh:
        result.to_html(fresh)
        yield


def print_result(result: Result) -> None:
    """Print the tables: as wide as the terminal and coloured there, 120 columns of plain text elsewhere."""
    if not sys.stdout.isatty():
        print(result)
        return
    from rich.console import Console

    from batchnorm.report.text import render

    Console().print(render(result.document()))


def print_json(data: Any) -> None:
    """Print data as JSON, in ASCII; NaN and infinity, which JSON has no way to write, become null."""
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return finite_or_none(data)
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
