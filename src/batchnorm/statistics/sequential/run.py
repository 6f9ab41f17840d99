"""One batch on its way through the model, which can be stopped at every norm and goes on later."""

from __future__ import annotations

import ctypes
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

from batchnorm.models.calling import below_autograd, compiled_modules_eager
from batchnorm.observers import OperatorMode
from batchnorm.statistics.operators import NormCall, run_with_functions
from batchnorm.statistics.sequential.run_memory import RunMemory
from batchnorm.statistics.sequential.thread_context import ThreadContext
from batchnorm.statistics.sites import Site, Sites

__all__ = ["Arrival", "ModelRun", "Stuck"]


_LOOKING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


@dataclass(frozen=True)
class Arrival:
    """The batch has reached a norm that is to be measured.

    Attributes:
        site: the norm.
        call: the call, not yet answered.
        visit: how often the batch has been there, this time included.
    """

    site: Site
    call: NormCall
    visit: int


@dataclass(frozen=True)
class _Work:
    """An operator that the model calls."""

    run: Callable[[], Any]
    arguments: Any


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None


class _Abandoned(BaseException):
    """Raised inside the model to leave it."""


GIVE_UP = 10
"""So many seconds a run that is abandoned is waited for."""


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an exception in another thread, before the next line of Python that it runs."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))


class Stuck(Exception):  # noqa: N818
    """The model has called no operator for so long that it may be waiting for another batch, which holds a lock."""


class ModelRun:
    """A forward pass in a thread of its own, which runs only while :meth:`go` waits for it.

    So there is never more than one at work, and a model meets nothing that it would not meet in a loop over the
    batches, except that other batches may pass between two of its lines. Operators are run by the thread that calls
    :meth:`go`: each thread that runs large ones would keep a pool of workers of its own.

    What the two threads hand each other goes through queues that are written in C: an interrupt, which may come between
    any two lines of Python, can leave none of their locks taken.

    Args:
        call: runs the model on the batch.
        sites: the norms at which it stops.
        ambient: the surroundings of the thread that made it.
        others: tensors that are there anyway, and do not count as the run's.
        seed: of torch's random numbers, should the model draw some, so that another run of this batch draws the same.
        before_work: is given the arguments of each operator before it runs.

    Attributes:
        looks_at_values: whether some operator told the model's code, or a branch of it, what its values are.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        sites: Sites,
        ambient: ThreadContext,
        others: Sequence[Tensor],
        seed: int,
        before_work: Callable[[Any], None] | None = None,
    ) -> None:
        self.storages = RunMemory(others)
        self._call: Callable[[], Any] | None = call
        self._before_work = before_work
        self._sites = sites
        self._ambient = ambient
        self._visits: dict[Site, int] = {}
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self.looks_at_values = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._ambient.context.copy().run, args=(self._body,), daemon=True)

    def start(self) -> None:
        """Make the thread; from then on somebody has to call :meth:`abandon`, unless the model returns.

        Raises:
            RuntimeError: the system allows no more threads.
        """
        self._thread.start()

    def go(self, answer: Any = None, patience: float | None = None) -> Arrival | None:
        """Run on until the next norm is reached.

        Args:
            answer: the output of the norm that it waits at, if it does.
            patience: how many seconds the model may take from one operator to the next; None for any number.

        Returns:
            Which norm that is; None if the model has returned.

        Raises:
            Exception: what the model raised.
            Stuck: it took longer; the run can only be abandoned.
        """
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            request = self._hand_over(answer, patience)
            while isinstance(request, _Work):
                request = self._hand_over(self._do(request), patience)
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)
        if isinstance(request, _Ended):
            self._thread.join()
            if request.error is not None:
                raise request.error
            return None
        arrived: Arrival = request
        return arrived

    def tell_to_leave(self) -> None:
        """Have the model left at its next operator, without waiting for it."""
        self._abandoned = True
        self._replies.put(None)

    def abandon(self) -> None:
        """Leave the model where it stands, and give all memory back.

        A model that calls no operator for a second, in a loop of its own say, is left by an exception between two lines
        of it. One that waits in something written in C, which no exception reaches, is given up with a warning.
        """
        self.tell_to_leave()  # in any case: a thread that was begun a moment ago is not alive yet
        for second in count():
            self._replies.put(None)
            if self._thread.is_alive():  # one that never began, for want of threads or after an interrupt, has no end
                self._thread.join(timeout=1)  # a model that catches everything is told again at its next operator
            if not self._thread.is_alive():
                break
            if second == GIVE_UP:
                compiled_modules_eager.forget(self._thread)
                warnings.warn(
                    "The model has been in one call that cannot be interrupted for "
                    f"{GIVE_UP} seconds; a thread is left behind, which ends when that call does.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                break
            raise_in(self._thread, _Abandoned)
        self._requests, self._call = SimpleQueue(), None

    # -- in the thread that calls go() ---------------------------------------------------------------------------------

    def _hand_over(self, reply: Any, patience: float | None) -> Any:
        self._replies.put(reply)
        del reply
        # Second by second: Python sees an interrupt that comes in the moment before a wait only when the wait is over.
        left = math.inf if patience is None else patience
        while left > 0:
            try:
                return self._requests.get(timeout=min(left, 1.0))
            except Empty:
                left -= 1.0
        raise Stuck(f"no operator was called for {patience:.0f} seconds")

    def _do(self, work: _Work) -> Any:
        try:
            if self._before_work is not None:
                self._before_work(work.arguments)
            output = work.run()
        except Exception as error:
            return _Raised(error)
        self.storages.note(output)
        return output

    # -- in its own ----------------------------------------------------------------------------------------------------

    def _body(self) -> None:
        self._replies.get()
        error: BaseException | None = None
        try:
            call, self._call = self._call, None
            if call is not None and not self._abandoned:
                with self._ambient.here(), below_autograd(), _Stops(self):
                    call()
                    del call
        except BaseException as raised:
            # one that nobody will look at would keep the model's tensors, by its frames
            error = None if self._abandoned else raised
        self._requests.put(_Ended(error))
        del error

    def ask(self, request: Any) -> Any:
        """Wait for what the request gives; the thread's own side."""
        if self._abandoned:
            raise _Abandoned
        self._requests.put(request)
        del request
        reply = self._replies.get()
        if self._abandoned:
            raise _Abandoned
        if isinstance(reply, _Raised):
            raise reply.error
        return reply

    def visit(self, site: Site) -> int:
        """Count a call of the site."""
        self._visits[site] = self._visits.get(site, 0) + 1
        return self._visits[site]

    def site_of(self, call: NormCall) -> Site | None:
        """Return the site that a call is to be measured at."""
        return self._sites.find(call.running_mean, call.running_var)


@dataclass(frozen=True)
class _Raised:
    error: Exception


class _Stops(OperatorMode):
    """Hands every operator of a run to whoever waits for it; views, which compute nothing, are made here."""

    supports_higher_order_operators = True

    def __init__(self, run: ModelRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self._run.looks_at_values = True
            return run_with_functions(self, func, args, given)
        norm = NormCall.of(func, args, given)
        if norm is not None:
            site = self._run.site_of(norm)
            if site is not None:
                return self._run.ask(Arrival(site, norm, self._run.visit(site)))
            return self._run.ask(_Work(norm.run, norm.given))
        if not _LOOKING.isdisjoint(func.tags):
            self._run.looks_at_values = True
        if func.is_view:
            return func(*args, **given)
        return self._run.ask(_Work(lambda: func(*args, **given), (args, given)))
