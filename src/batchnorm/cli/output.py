"""Where things go: the result to stdout, everything else to stderr, files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

from batchnorm.cli.errors import CommandError, reason
from batchnorm.errors import BatchNormError
from batchnorm.files.failures import system_error
from batchnorm.files.replace import Together, is_same, together
from batchnorm.harmless import harmless
from batchnorm.report.result import Result, finite_or_none
from batchnorm.report.text import usual_width

__all__ = [
    "STATE_SUFFIXES",
    "Files",
    "check_apart",
    "check_destinations",
    "check_folder",
    "note",
    "only_result_on_stdout",
    "print_json",
    "print_result",
    "publish",
    "writing",
]

STATE_SUFFIXES = (".safetensors", ".pt", ".pth")


def note(text: str) -> None:
    """Tell the user something beside the result, on stderr: on a terminal at most as wide as that, else one line."""
    lead = "note: "
    shown = f"{lead}{harmless(text)}"
    if sys.stderr.isatty():
        indent = " " * len(lead)
        shown = textwrap.fill(
            shown, usual_width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    print(shown, file=sys.stderr)


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


def check_apart(outputs: Mapping[str, Path | None], read: Mapping[str, Path | None] | None = None) -> None:
    """Find out before the work whether each file to be written has a place of its own.

    Args:
        outputs: by option. ``--output`` may take the place of what was read: it is that, changed.
        read: files that are read, by option.

    Raises:
        CommandError: two are one, also by links.
    """
    there = {option: path for option, path in outputs.items() if path is not None}
    for (one, first), (other, second) in combinations(there.items(), 2):
        if is_same(first, second):
            raise CommandError(f"{other} {second}: that is {one}; each needs a file of its own.")
    for (option, path), (other, given) in product(there.items(), (read or {}).items()):
        if option != "--output" and given is not None and is_same(path, given):
            raise CommandError(f"{option} {path}: that is {other}, which would be lost; name another file.")


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
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise CommandError(f"{option} {path}: no directory {folder}; make it first.")
    if not os.access(folder, os.W_OK):
        raise CommandError(f"{option} {path}: no right to write in {folder}.")


class Files:
    """The files of one command: each is written beside its place, and all take their places together."""

    def __init__(self, files: Together) -> None:
        self._files = files
        self._options: dict[Path, str] = {}

    def write(self, option: str, path: Path | None, writer: Callable[[Path], object]) -> None:
        """Let a function write the file that an option names, if it names one.

        Raises:
            CommandError: the disk is full, or the system refuses otherwise.
        """
        if path is None:
            return
        self._options[Path(os.path.realpath(path))] = f"{option} {path}"
        try:
            fresh = self._files.beside(path)
            try:
                writer(fresh)
            except (OSError, BatchNormError):
                raise
            except Exception as error:
                found = system_error(error, fresh)
                if found is None:
                    raise
                raise found from error
        except OSError as error:
            raise CommandError(f"{option} {path}: cannot be written ({error.strerror or error}).") from error
        except BatchNormError:
            raise
        except Exception as error:
            raise CommandError(f"{option} {path}: cannot be written ({reason(error)}).") from error

    def sentence(self, error: OSError) -> str | None:
        """Return what is said of a file that cannot take its place; None for an error of something else."""
        named = self._options.get(Path(str(error.filename2 or error.filename)))
        return named and f"{named}: cannot be written ({error.strerror or error})."


@contextlib.contextmanager
def writing(*read: Path | str | None) -> Iterator[Files]:
    """Let a command write its files: all of them, or none if any cannot be written.

    Args:
        read: files that the command has read. One that is to be replaced is replaced after all others.

    Raises:
        CommandError: one cannot take its place.
    """
    try:
        with together([Path(path) for path in read if path is not None]) as files:
            mine = Files(files)
            yield mine
    except OSError as error:
        sentence = mine.sentence(error)
        if sentence is None:
            raise
        raise CommandError(sentence) from error


def publish(
    result: Result,
    *,
    json_: bool = False,
    verbose: bool = False,
    html: Path | None = None,
    output: Path | None = None,
    **more: Any,
) -> None:
    """Show a result the way it was asked for; ``html`` and ``output`` are the files written beside it."""
    if json_:
        print_json(result.to_dict() | more | {"output": _name(output), "html": _name(html)})
    else:
        print_result(result, verbose=verbose)
        for path in filter(None, (output, html)):
            note(f"wrote {path}.")


def print_result(result: Result, *, verbose: bool = False) -> None:
    """Print what matters, or all: as wide as the terminal and coloured there; elsewhere plain, of ``COLUMNS`` or 80."""
    from batchnorm.report.short import shortened
    from batchnorm.report.text import render, to_text

    document = result.document() if verbose else shortened(result.document(), "--verbose")
    if not sys.stdout.isatty():
        print(to_text(document))
        return
    from rich.console import Console

    Console().print(render(document))


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
