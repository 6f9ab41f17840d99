"""Why a file cannot be written, in the words of the system: C++ and Rust have long ones of their own."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["system_error"]

_NUMBER = re.compile(r"\(os error (\d+)\)")  # how Rust ends what the system told it
_SOME_MORE = 1 << 16


def system_error(error: Exception, path: Path) -> OSError | None:
    """Return the error of the system that made a writer fail; None if there is none to be found.

    Args:
        error: what the writer raised.
        path: what it was writing; it is not used any more.
    """
    number = _NUMBER.search(str(error))
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    try:
        with path.open("ab") as file:  # the reason is there still
            file.write(bytes(_SOME_MORE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as found:
        return found
    return None
