"""One command in several processes, under ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn import Module

__all__ = ["Part", "Processes", "processes"]


class Processes:
    """This process and those that run beside it.

    Attributes:
        group: None if it runs alone.
        rank: its number, from 0.
        size: how many there are.
    """

    def __init__(self, group: ProcessGroup | None, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    @property
    def speaks(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def part(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return this process's part of a stream that all of them have."""
        return batches if self.size == 1 else Part(batches, self.rank, self.size)


class Part:
    """Every n-th batch of a stream."""

    def __init__(self, batches: Iterable[Any], rank: int, size: int) -> None:
        self._batches = batches
        self._rank = rank
        self._size = size

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this part; batches of the others are made and thrown away."""
        return islice(iter(self._batches), self._rank, None, self._size)


@contextmanager
def processes(model: Module) -> Iterator[Processes]:
    """Join the processes that torchrun started, as long as the body runs; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield Processes(None, 0, 1)
        return
    from torch import cuda, distributed

    on_gpu = any(p.device.type == "cuda" for p in model.parameters())
    if on_gpu:
        cuda.set_device(next(model.parameters()).device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(distributed.group.WORLD, distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
