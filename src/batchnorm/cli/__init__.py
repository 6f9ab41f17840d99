"""The command line: ``batchnorm demo | diagnose | recalibrate | merge | fold | unfold | check | watch | info``."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

import typer

from batchnorm.cli.app import app
from batchnorm.cli.errors import one_line, reason
from batchnorm.errors import BatchNormError
from batchnorm.harmless import harmless
from batchnorm.report.provenance import command

__all__ = ["main"]

ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
READER_LEFT = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code.

    0: done. 1: done, and the answer is no (findings, drift). 2: an error, told in one sentence on stderr, with nothing
    on stdout and no file changed. 130: interrupted. 141: who read stdout left before the end; the files are written.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _replace_closed_streams()
    stdout = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that the terminal lacks is no reason to fail
    try:
        with command(shlex.join(["batchnorm", *arguments])):
            code = app(args=arguments, prog_name="batchnorm", standalone_mode=False) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        code = _reader_left(stdout)
    except SystemExit:
        if sys.stdout is stdout:
            raise
        code = _reader_left(stdout)  # typer met the same, and would leave with 1, which means no here
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            print(harmless(traceback.format_exc(), lines=True), end="", file=sys.stderr)
        complain(_sentence(error))
        code = ERROR
    if code == INTERRUPTED:
        complain("interrupted; every file is as it was, or complete.")
    sys.exit(code)


def _replace_closed_streams() -> None:
    """Let what goes to a stream that is closed (``>&-``) go nowhere: Python has None in its place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - for the rest of the process


def _reader_left(stdout: TextIO) -> int:
    """Let what is still to be printed go nowhere, so that Python does not complain about it at the end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stdout.fileno())
        os.close(nowhere)
    return READER_LEFT


def complain(sentence: str) -> None:
    """Print an error on stderr, on one line however narrow the terminal."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), sentence)
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def _sentence(error: Exception) -> str:
    if isinstance(error, BatchNormError):
        return f"{one_line(str(error))}{_doubt(error)}"
    usage = getattr(error, "format_message", None)  # an option typed wrong; the class moved between typer's versions
    if callable(usage):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "batchnorm"
        return f"{one_line(usage())} See {command} --help."
    if isinstance(error, OSError) and error.strerror:
        return one_line(": ".join(filter(None, (error.filename and str(error.filename), error.strerror))))
    if isinstance(error, MemoryError):
        return "not enough memory."
    return f"{reason(error)}. Run it again with --debug to see where."


def _doubt(error: BatchNormError) -> str:
    """Return what about the data may be why a model failed; nothing is imported for it."""
    read = sys.modules.get("batchnorm.cli.load.batches")
    failed = isinstance(error.__cause__, RuntimeError | TypeError | ValueError | IndexError)
    said = read.doubt() if read is not None and failed and not isinstance(error.__cause__, BatchNormError) else ""
    return f" {said}" if said else ""
