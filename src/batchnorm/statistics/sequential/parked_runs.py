"""Which of the batches that wait at a norm keep their memory, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchnorm.statistics.sequential.disk_cache import DiskCache
from batchnorm.statistics.sequential.run import ModelRun

__all__ = ["MOST_RUNS", "Waiting"]

MOST_RUNS = 2000
"""So many threads wait at most; systems allow some thousands a process."""


class Waiting:
    """Keeps runs within a limit; those beyond it go to disk, or are left and start anew.

    Args:
        room: returns how many bytes the waiting runs may take together now.
        fits: returns whether the process as a whole takes no more memory than it may.
        shelf: where the others are put; None leaves them.
    """

    def __init__(
        self, room: Callable[[], float], fits: Callable[[], bool], shelf: DiskCache | None, *, apart: bool = False
    ) -> None:
        self.most_runs = 0 if apart else MOST_RUNS
        self._room = room
        self._fits = fits
        self._shelf = shelf
        self._nbytes: dict[ModelRun, int] = {}  # of those in memory; 0 for those on the shelf
        self._total = 0

    def __len__(self) -> int:
        """Return how many runs wait, wherever their memory is."""
        return len(self._nbytes)

    def keep(self, run: ModelRun) -> bool:
        """Take in a run that waits; False if it had to be left, for lack of memory."""
        nbytes = run.storages.nbytes()
        if len(self._nbytes) < self.most_runs:
            if self._total + nbytes <= self._room() and self._fits():
                self._nbytes[run] = nbytes
                self._total += nbytes
                return True
            if self._shelf is not None:
                self._shelf.put(run)
                self._nbytes[run] = 0
                return True
        run.abandon()
        return False

    def wake(self, run: ModelRun) -> None:
        """Give a run that goes on its memory back."""
        self._total -= self._nbytes.pop(run)
        if self._shelf is not None:
            self._shelf.bring(run)

    @property
    def too_much(self) -> bool:
        """Whether what waits in memory has to become less, because something else has grown."""
        return self._total > 0 and (self._total > self._room() or not self._fits())

    def shrink(self, run: ModelRun) -> bool:
        """Take the memory of a run that waits; False if it had to be left."""
        if self._shelf is None:
            self.leave(run)
            return False
        if self._nbytes[run]:
            self._shelf.put(run)
            self._total -= self._nbytes[run]
            self._nbytes[run] = 0
        return True

    def leave(self, run: ModelRun) -> None:
        """Give up a run that waits."""
        run.abandon()  # first: an interrupt may come between
        if self._shelf is not None:
            self._shelf.drop(run)
        self._total -= self._nbytes.pop(run)

    def require(self, arguments: Any) -> None:
        """Give the tensors that an operator is about to read their memory back."""
        if self._shelf is not None:
            self._shelf.require(arguments)

    def close(self) -> None:
        """Give up all of them."""
        for run in list(self._nbytes):
            self.leave(run)
