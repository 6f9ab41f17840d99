"""How much memory the process takes, and giving back what the allocator keeps for later."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["Resident", "resident"]


_SHARE = 0.95
"""Of the limit, so that what a run needs on its way fits too."""
_LEAST = 1 << 24
"""Growth below this is not looked at: interpreter and libraries take as much as they go."""


class Resident:
    """Watches by how much the memory of the process has grown since this object was made.

    What tensors take is not what the process takes: an allocator keeps what was freed, between what is not. So the
    pages that hold nothing are given back to the system when there are too many of them. Where the system does not
    tell, nothing is known to have grown.
    """

    def __init__(self) -> None:
        self._before = resident() or 0

    def within(self, limit: float) -> bool:
        """Return whether the process has grown by no more than 95 % of this; empty pages are given back first."""
        limit = max(_SHARE * limit, _LEAST)
        if self._growth() <= limit:
            return True
        trim = _trim()
        if trim is None:
            return True  # what is kept for later cannot be told from what is in use
        trim(0)
        return self._growth() <= limit

    def _growth(self) -> int:
        now = resident()
        return 0 if now is None else now - self._before


def resident() -> int | None:
    """Return how many bytes of memory this process takes; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


@cache
def _trim() -> Callable[[int], int] | None:
    """Return the function of the GNU C library that gives empty pages back to the system."""
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
