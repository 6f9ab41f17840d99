"""Random generators left as they were, by several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from batchnorm.blocks import undone
from batchnorm.models.transaction import on_failure

__all__ = ["generators_kept"]


class _Kept:
    """``torch.random.fork_rng`` for several threads at once.

    The generators are the process's. Of overlapping uses each puts back what it met, which may be what another one drew
    in between; so the last of them puts back what the first one met. Uses are counted by thread, and one that has
    ended counts no more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depths: MutableMapping[threading.Thread, int] = WeakKeyDictionary()
        self._first: dict[int | None, Tensor] = {}

    @contextmanager
    def __call__(self, devices: Sequence[int] = ()) -> Iterator[None]:
        """Put the generators of the CPU and of these CUDA devices back after the body."""
        thread = threading.current_thread()
        depth = self._depths.get(thread, 0)
        before: dict[int | None, Tensor] = {}
        entered = False

        def enter() -> None:
            nonlocal entered
            with self._lock:
                before.update({place: _state(place) for place in (None, *devices)})
                if not self._is_used():
                    self._first = {}
                for place, state in before.items():
                    self._first.setdefault(place, state)
                entered = True
                self._depths[thread] = depth + 1

        def leave() -> None:
            nonlocal entered
            with self._lock:
                if not entered:
                    return
                self._depths[thread] = depth
                last = not self._is_used()
                for place, state in (before | self._first if last else before).items():
                    _set_state(place, state)
                entered = False  # last: after an interrupt in here it is done again

        on_failure(leave)
        yield from undone(enter, leave)

    def _is_used(self) -> bool:
        return any(depth and thread.is_alive() for thread, depth in self._depths.items())


generators_kept = _Kept()
"""Enter ``generators_kept(devices)`` around what may draw random numbers, or seed the generators."""


def _state(device: int | None) -> Tensor:
    return torch.get_rng_state() if device is None else torch.cuda.get_rng_state(device)


def _set_state(device: int | None, state: Tensor) -> None:
    if device is None:
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
