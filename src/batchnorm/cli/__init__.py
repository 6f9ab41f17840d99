"""The command line: ``batchnorm demo | diagnose | recalibrate | merge | fold | unfold | check | watch | info``."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence

import typer

from batchnorm.cli.app import app
from batchnorm.cli.errors import one_line, reason
from batchnorm.errors import BatchNormError

__all__ = ["main"]

ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code.

    0: done. 1: done, and the answer is no (findings, drift). 2: an error, told in one sentence on stderr, with nothing
    on stdout and no file changed. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that the terminal lacks is no reason to fail
    try:
        code = app(args=arguments, prog_name="batchnorm", standalone_mode=False) or 0
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        complain(_sentence(error))
        code = ERROR
    if code == INTERRUPTED:
        complain("interrupted; every file is as it was, or complete.")
    sys.exit(code)


def complain(sentence: str) -> None:
    """Print an error on stderr, on one line however narrow the terminal."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), sentence)
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def _sentence(error: Exception) -> str:
    if isinstance(error, BatchNormError):
        return one_line(str(error))
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
