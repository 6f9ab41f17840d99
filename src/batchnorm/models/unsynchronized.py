"""Forward passes of which each process may make as many as it likes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

__all__ = ["unsynchronized"]


@contextmanager
def unsynchronized(model: Module) -> Iterator[None]:
    """Keep ``DistributedDataParallel`` from waiting for the other processes in the forward passes of the body.

    It sends its buffers before each pass, in eval mode too, and the gradients in the backward pass of each; processes
    with different numbers of batches, or one that looks at the model by itself, would wait for ever.
    """
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    before = [(m, m.require_forward_param_sync, m.require_backward_grad_sync) for m in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = wrapper.require_backward_grad_sync = False
        yield
    finally:
        for wrapper, forward, backward in before:
            wrapper.require_forward_param_sync, wrapper.require_backward_grad_sync = forward, backward
