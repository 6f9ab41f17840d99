"""The memory that a batch takes while it waits on its way through the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from batchnorm.observers import is_transformed

__all__ = ["RunMemory"]


class RunMemory:
    """The storages that operators have made for one batch; it keeps none of them alive."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        """Set aside the tensors that exist anyway: parameters, buffers, the batch itself."""
        self._others = {_address(t) for t in others if _has_storage(t)}
        self._made: dict[int, StorageWeakRef] = {}
        self._more = 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are alive as long as the run is, but not its to give back."""
        self._more += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)

    def note(self, output: Any) -> None:
        """Remember what an operator returned."""
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and _has_storage(t):
                address = _address(t)
                if address not in self._others:
                    known = self._made.get(address)
                    if known is None or known.expired():
                        self._made[address] = StorageWeakRef(t.untyped_storage())

    def alive(self) -> list[torch.UntypedStorage]:
        """Return those that somebody still holds."""
        found = []
        for address, reference in list(self._made.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._made[address]
            else:
                found.append(storage)
        return found

    def nbytes(self) -> int:
        """Return how much memory they take, in bytes."""
        return self._more + sum(storage.nbytes() for storage in self.alive())


def _has_storage(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_meta and not is_transformed(t)


def _address(t: Tensor) -> int:
    address: int = t.untyped_storage()._cdata
    return address
