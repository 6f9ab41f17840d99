"""One command in several processes, under ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from batchnorm.statistics.stream import part_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn import Module

__all__ = ["Processes", "processes"]


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
        return part_of(batches, first=self.rank, every=self.size)


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
