"""Work that is too small to share out among threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchnorm.dataflow.graph import Graph

__all__ = ["one_thread", "threads_for_float64"]

_MANY_GROUPS = 8
_LOCK = threading.RLock()  # the setting is the process's: what one thread puts back, another must not have changed


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread while the context lasts."""
    with _LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def threads_for_float64(graph: Graph) -> Iterator[None]:
    """Run the body on one thread if the pass has convolutions with many groups.

    On a CPU, float64 convolutions are computed group by group, each in a parallel region of its own. Those of a
    depthwise convolution are shorter than it takes to start the threads.
    """
    if all(call.args.get("groups", 1) <= _MANY_GROUPS for call in graph.calls):
        yield
        return
    with one_thread():
        yield
