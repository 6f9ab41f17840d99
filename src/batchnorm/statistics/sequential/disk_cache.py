"""Waiting batches put aside on disk."""

from __future__ import annotations

import ctypes
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from batchnorm.errors import BatchError
from batchnorm.statistics.sequential.run import ModelRun

__all__ = ["DiskCache"]


class DiskCache:
    """Takes the memory of waiting runs to files in a folder of its own, and back.

    The tensors of a run stay what they are, without memory, until :meth:`bring` is called. What cannot give its memory
    back (that of numpy, that of another process) stays where it is.
    """

    def __init__(self, folder: str | Path) -> None:
        self._given = folder
        self._folder = Path(folder) / f"batchnorm-{uuid4().hex}"
        # should an interrupt come between two lines: removed with this object, or when Python ends
        self._removed_at_last = weakref.finalize(self, _remove, self._folder)
        try:
            self._folder.mkdir(mode=0o700)
        except OSError as error:
            raise _refused(folder, error) from error
        self._files: dict[ModelRun, Path] = {}
        self._away: dict[ModelRun, list[tuple[torch.UntypedStorage, int]]] = {}  # with their sizes
        self._owner: dict[int, ModelRun] = {}

    def __enter__(self) -> DiskCache:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the folder and all that is in it."""
        try:
            for run in list(self._away):
                self.drop(run)
        finally:
            _remove(self._folder)
            self._removed_at_last.detach()

    def put(self, run: ModelRun) -> None:
        """Take the memory of a run to disk.

        Raises:
            BatchError: the disk is full, or the system refuses otherwise; the run has its memory still.
        """
        storages = [s for s in run.storages.alive() if s.nbytes() and s.resizable() and not s.is_shared()]
        path = self._folder / f"{id(run)}.bin"
        try:
            with path.open("wb") as file:
                for storage in storages:
                    file.write(_memory(storage))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _refused(self._given, error) from error
        self._away[run] = [(storage, storage.nbytes()) for storage in storages]
        self._files[run] = path
        for storage in storages:
            self._owner[storage._cdata] = run
            storage.resize_(0)

    def bring(self, run: ModelRun) -> None:
        """Give a run its memory back, if it is on the shelf.

        Raises:
            BatchError: the file is gone, or cannot be read.
        """
        storages = self._away.get(run)
        if storages is None:
            return
        path = self._files[run]
        try:
            with path.open("rb") as file:
                for storage, size in storages:
                    _fill(storage, size, file)
                    self._owner.pop(storage._cdata, None)
        except OSError as error:
            raise _refused(self._given, error) from error
        del self._away[run], self._files[run]
        path.unlink(missing_ok=True)

    def drop(self, run: ModelRun) -> None:
        """Forget a run that has been left; what the model or the user holds too gets its memory back."""
        storages, path = self._away.pop(run, None), self._files.pop(run, None)
        if storages is None or path is None:
            return
        kept = [(StorageWeakRef(storage), size) for storage, size in storages]
        while storages:
            self._owner.pop(storages.pop()[0]._cdata, None)
        if not all(reference.expired() for reference, _ in kept):
            with suppress(OSError), path.open("rb") as file:
                for reference, size in kept:
                    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                    if storage is None:
                        file.seek(size, os.SEEK_CUR)
                    else:
                        _fill(storage, size, file)
        path.unlink(missing_ok=True)

    def require(self, arguments: Any) -> None:
        """Bring back the runs whose memory an operator is about to read: models may keep tensors between batches."""
        if not self._away:
            return
        for t in tree_leaves(arguments):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                owner = self._owner.get(t.untyped_storage()._cdata)
                if owner is not None:
                    self.bring(owner)


def _remove(folder: Path) -> None:
    """Remove a folder and all that is in it, however often that is interrupted; the interrupt is raised then."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            break
        except KeyboardInterrupt as again:
            interrupt = again
    if interrupt is not None:
        raise interrupt


def _fill(storage: torch.UntypedStorage, size: int, file: Any) -> None:
    """Give a storage its memory, and what the file holds next."""
    storage.resize_(size)
    values = torch.UntypedStorage(size)
    file.readinto(_memory(values))
    storage.copy_(values)


def _memory(storage: torch.UntypedStorage) -> Any:
    """Return the bytes of a storage, or of a copy on the CPU; numpy's view would forbid to resize it."""
    here = storage.cpu()
    memory = (ctypes.c_char * here.nbytes()).from_address(here.data_ptr())
    memory._kept = here  # as long as somebody looks at its bytes
    return memory


def _refused(folder: str | Path, error: OSError) -> BatchError:
    return BatchError(
        f"recalibrate: cache={str(folder)!r}: {error.strerror or error}. Waiting batches are put there when memory= "
        "is used up. Name a folder that exists and has more room, pass a larger memory=, or leave cache= out: batches "
        "that do not fit are run again instead. The model is as it was."
    )
