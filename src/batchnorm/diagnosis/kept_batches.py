"""Batches that are kept, since a diagnosis walks through them several times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.statistics.stream import numbered, require_stream

__all__ = ["MOST_BATCHES", "batch_size", "first_tensor", "float_inputs", "hold", "rows", "split", "with_input"]

MOST_BATCHES = 32
"""A longer stream ends when both so many batches and 1024 samples are kept: more would tell little more."""

_ENOUGH = 1024


def hold(batches: Iterable[Any]) -> list[Any]:
    """Return the first batches of a stream.

    Raises:
        ArgumentTypeError: it is no stream of batches.
        BatchError: the loader failed.
        EmptyStreamError: there was none.
    """
    require_stream("diagnose", batches)
    held: list[Any] = []
    samples = 0
    for index, batch in numbered("diagnose", batches):
        held.append(batch)
        samples += batch_size(batch)
        if index + 1 >= MOST_BATCHES and samples >= _ENOUGH:
            break
    return held


def batch_size(batch: Any) -> int:
    """Return the number of samples: the size of the first dimension of the first tensor that has one; else 1."""
    return next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 0), 1)


def rows(batch: Any, index: Tensor | slice) -> Any:
    """Return the batch with only these samples: of every tensor that has as many rows as the batch has samples."""
    size = batch_size(batch)

    def take(leaf: Any) -> Any:
        return leaf[index] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size else leaf

    return tree_map(take, batch)


def split(batch: Any, size: int) -> Iterator[Any]:
    """Yield the batch in pieces of so many samples; a smaller rest is left out."""
    for start in range(0, batch_size(batch) - size + 1, size):
        yield rows(batch, slice(start, start + size))


def first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor of a batch: its input; None if it holds no tensor."""
    return next((t for t in tree_leaves(batch) if isinstance(t, Tensor)), None)


def float_inputs(batch: Any) -> bool:
    """Return whether the batch is, or begins with, a floating-point tensor of samples."""
    first = first_tensor(batch)
    return first is not None and first.is_floating_point() and first.dim() > 1


def with_input(batch: Any, change: Any) -> Any:
    """Return the batch with its first tensor changed."""
    first = first_tensor(batch)
    with torch.no_grad():
        changed = change(first)
    return tree_map(lambda leaf: changed if leaf is first else leaf, batch)
