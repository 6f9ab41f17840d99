"""A progress bar on stderr, or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Bar", "progress_bar"]


class Bar:
    """Counts steps; shows nothing unless it was given a bar to move."""

    def __init__(self, progress: Progress | None = None, total: float | None = None, title: str = "") -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total) if progress else None

    def advance(self, steps: float = 1) -> None:
        """Move on by some steps."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)


@contextmanager
def progress_bar(show: bool | None, total: float | None, title: str) -> Iterator[Bar]:
    """Yield a bar that lives on stderr while the context lasts and then disappears.

    Args:
        show: True or False; None shows it only where stderr is a terminal.
        total: number of steps; None when it is not known.
        title: what is going on, in a word or two.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield Bar()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress, total, title)
