"""A process for each competitor, because the allocator reads its environment once; they work in turns, never together.

A worker answers one command after another over a pipe: ``prepare`` a case, take a ``turn``, measure ``memory``,
``release`` the case.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.train_step.cases import Case
from benchmarks.train_step.competitors import HUGE_PAGES, Competitor, NotOfferedError

_WARM_UP = 3
# so long the threads of a worker may spin after its turn, before the next worker's
_SETTLE_S = 0.01


class FailedError(RuntimeError):
    """A worker's command raised an exception; the message holds its traceback."""


class Worker:
    """The parent's end of a competitor's process."""

    def __init__(self, competitor: Competitor, threads: int, preload: Sequence[str] = ()) -> None:
        self.competitor = competitor
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, competitor, threads, preload))
        with _environment(competitor.environment):
            self._process.start()
        theirs.close()

    def prepare(self, case: Case) -> dict[str, Any]:
        """Build the case and run it a few times; return what ran, and the seconds that one repetition took.

        Raises:
            NotOfferedError: the competitor cannot.
            FailedError: it failed.
        """
        answer: dict[str, Any] = self._ask("prepare", case)
        return answer

    def turn(self, repetitions: int, longest: float) -> list[dict[str, float]]:
        """Run the case so often, after once that does not count; return seconds by phase of each.

        On a busy machine a turn ends early: after ``longest`` seconds, but not before it ran twice.
        """
        answer: list[dict[str, float]] = self._ask("turn", repetitions, longest)
        time.sleep(_SETTLE_S)
        return answer

    def memory(self) -> dict[str, int | None]:
        """Return the peaks of :mod:`benchmarks.train_step.memory` over one repetition."""
        answer: dict[str, int | None] = self._ask("memory")
        return answer

    def release(self) -> None:
        """Forget the case."""
        self._ask("release")

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()  # it ends when it finds nobody there
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, command: str, *arguments: Any) -> Any:
        self._pipe.send((command, arguments))
        try:
            kind, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.competitor.name}: the worker has ended; see its output above") from None
        if kind == "not offered":
            raise NotOfferedError(answer)
        if kind == "error":
            raise FailedError(f"{self.competitor.name}: {command} failed\n{answer}")
        return answer


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set these variables for the processes that start here; huge pages only where asked for."""
    before = dict(os.environ)
    os.environ.pop(HUGE_PAGES, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Servant:
    """The worker's end."""

    def __init__(self, file: str) -> None:
        from benchmarks.train_step import subjects  # the library is what it was when the run began

        self._file, self._make = file, subjects.make
        self._subject: Any = None

    def prepare(self, case: Case) -> dict[str, Any]:
        self._subject = self._make(self._file, case)
        took = []
        for _ in range(_WARM_UP):
            start = time.perf_counter()
            self._subject.once()
            took.append(time.perf_counter() - start)
        return {**self._subject.info(), "seconds": min(took)}

    def turn(self, repetitions: int, longest: float) -> list[dict[str, float]]:
        gc.collect()
        gc.disable()
        self._subject.once()
        end = time.perf_counter() + longest
        taken: list[dict[str, float]] = []
        while len(taken) < 2 or (len(taken) < repetitions and time.perf_counter() < end):
            taken.append(self._subject.once())
        gc.enable()
        return taken

    def memory(self) -> dict[str, int | None]:
        from benchmarks.train_step import memory

        once = self._subject.once
        resident = memory.resident_peak(once)  # first: the profiler keeps memory of its own
        return {"allocated_peak": memory.allocated_peak(once), "resident_peak": resident}

    def release(self) -> None:
        self._subject = None
        gc.collect()


def _serve(pipe: Connection, competitor: Competitor, threads: int, preload: Sequence[str]) -> None:
    import torch

    for module in preload:
        importlib.import_module(module)
    torch.set_num_threads(threads)
    servant = _Servant(competitor.file)
    while True:
        try:
            command, arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = ("done", getattr(servant, command)(*arguments))
        except NotOfferedError as error:
            answer = ("not offered", str(error))
        except Exception:
            answer = ("error", traceback.format_exc())
        pipe.send(answer)
