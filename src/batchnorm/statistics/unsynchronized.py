"""Forward passes of which each process may make as many as it likes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

__all__ = ["unsynchronized"]


@contextmanager
def unsynchronized(model: Module) -> Iterator[None]:
    """Keep ``DistributedDataParallel`` from sending its buffers to the other processes before each forward pass.

    It does so in eval mode too; processes with different numbers of batches would wait for each other for ever.
    """
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    before = [(m, m.require_forward_param_sync) for m in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, synchronized in before:
            wrapper.require_forward_param_sync = synchronized
