"""Small batches that follow each other, joined to one input of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from batchnorm.models.calling import Forward, call_on_batch

__all__ = ["Group", "Groups", "joined"]

FIRST_ALONE = 16
"""So many batches run by themselves: a short stream is not worth joining."""
SAMPLES = 64
"""A group of this many samples costs little more than its operators."""
NBYTES = 1 << 20
"""Nor is a group joined further whose input takes this much memory."""
RUNS = 128
"""Whenever there are so many runs more, groups become twice as large, so that threads do not grow with the stream."""

Group = list[tuple[int, Any]]
"""Batches with their indices."""


class Groups:
    """Cuts a stream into groups of small batches that can be joined along their first dimension.

    Those are tensors, or containers of tensors, of the same shapes, dtypes and structure, of which every tensor has the
    same first dimension. Whether the model treats them alike, joined or not, is for somebody else to see.

    Args:
        call: how the model is called: of a tuple, the labels are left out where nobody reads them.
        limit: of the memory that the waiting runs may take.
        joins: whether anything is to be joined.
    """

    def __init__(self, call: Forward, limit: float, *, joins: bool) -> None:
        self._whole = call is not call_on_batch
        self._limit = limit
        self._joins = joins

    def of(self, batches: Iterable[tuple[int, Any]], runs: Callable[[], int]) -> Iterator[Group]:
        """Yield the batches in groups; ``runs`` tells how many groups there were.

        A batch is copied before the next one is asked for, unless it stays alone: loaders use memory again.
        """
        pending: Group = []
        kind: Any = None
        for index, batch in batches:
            growth = runs() // RUNS
            most = min(SAMPLES << growth, 1 << 30)
            new = _kind(self._part(batch)) if self._joins and index >= FIRST_ALONE else None
            nbytes = 0 if new is None else _nbytes(self._part(batch))
            if pending and (new != kind or not self._fits(len(pending) + 1, kind, nbytes, most, growth)):
                yield pending
                pending = []
            kind = new
            if new is None or not self._fits(2, new, nbytes, most, growth):
                yield [(index, batch)]
                continue
            pending.append((index, self.copied(batch)))
            del batch
        if pending:
            yield pending

    def copied(self, batch: Any) -> Any:
        """Return a copy of what the model reads of a batch."""
        leaves, structure = tree_flatten(self._part(batch))
        return tree_unflatten([t.clone() if isinstance(t, Tensor) else t for t in leaves], structure)

    def _part(self, batch: Any) -> Any:
        """Return what the model reads of a batch."""
        while not self._whole and isinstance(batch, tuple | list) and batch:
            batch = batch[0]
        return batch

    def _fits(self, number: int, kind: Any, nbytes: int, most: int, growth: int) -> bool:
        room = min(NBYTES << min(growth, 20), self._limit / 64)
        return number * kind[0] <= most and number * nbytes <= room


def joined(group: Group) -> Any:
    """Return the batches of a group as one."""
    if len(group) == 1:
        return group[0][1]
    flat = [tree_flatten(batch) for _, batch in group]
    leaves = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([torch.cat(same) if isinstance(same[0], Tensor) else same[0] for same in leaves], flat[0][1])


def _kind(batch: Any) -> Any:
    """Return what batches must have in common to be joined, the number of samples first; None for one that cannot."""
    leaves, structure = tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(map(_is_plain, tensors)) or len({len(t) for t in tensors}) > 1 or not len(tensors[0]):
        return None
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if not all(isinstance(leaf, bool | int | float | str | None) for leaf in others):
        return None
    shapes = [(t.shape, t.dtype, t.device) for t in tensors]
    return len(tensors[0]), shapes, others, str(structure)


def _is_plain(t: Tensor) -> bool:
    plain = type(t) is Tensor and t.layout == torch.strided and t.dim() > 0
    return plain and not (t.requires_grad or t.is_quantized or t.is_conj() or t.is_neg() or t.is_meta)


def _nbytes(batch: Any) -> int:
    return sum(t.nbytes for t in tree_flatten(batch)[0] if isinstance(t, Tensor))
