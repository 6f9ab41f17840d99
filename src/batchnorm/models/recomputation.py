"""Whether a forward pass is one that activation checkpointing runs again."""

from __future__ import annotations

import torch

__all__ = ["recomputing"]


def recomputing() -> bool:
    """Return whether this thread is inside a backward pass, where forwards run only to compute something again.

    Both kinds of ``torch.utils.checkpoint`` do so: the reentrant one in the backward of its autograd function, the
    other when autograd asks for a tensor that it has not kept. The batch is in the running statistics already.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
