"""The batches of a stream, at hand again whenever a run has to start anew."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from batchnorm.errors import StateError
from batchnorm.files.tensor_memory import bytes_of
from batchnorm.statistics.stream import length_of, numbered

__all__ = ["ReplayableBatches", "tensors_of"]


_OVERHEAD = 4096
"""What a batch takes beside its values: the objects that stand for it and its way."""
_MOST_UNHELD = 10_000
"""A stream that is not held and tells no length is taken for endless after so many batches."""


class ReplayableBatches:
    """Holds the batches as long as they fit; beyond that walks through the stream again, and sees that it is the same.

    Args:
        stream: what the user gave.
        limit: how many bytes of batches may be held.
        allow_empty: whether a stream without a single batch is none the less one.
    """

    def __init__(self, stream: Iterable[Any], limit: float, *, allow_empty: bool) -> None:
        self._stream = stream
        self._limit = limit
        self._walk = numbered("recalibrate", stream, allow_empty=allow_empty)
        self._held: list[Any] | None = []
        self._versions: list[list[int]] = []
        self._marks: list[int] = []  # what each batch was like; while they are held, the first only
        self._most = _MOST_UNHELD
        self.nbytes = 0  # of the batches held here and nowhere else
        self.ended = False

    @property
    def held(self) -> bool:
        """Whether every batch is held here or by the user."""
        return self._held is not None

    def __len__(self) -> int:
        """Return how many batches have been met so far."""
        return len(self._marks if self._held is None else self._held)

    def new(self) -> Any:
        """Return the next batch that nobody has seen yet; :attr:`ended` says that there was none, and None comes."""
        index, batch = next(self._walk, (0, _NONE))
        while batch is not _NONE and index < len(self):  # seen before, in a walk that was begun anew
            index, batch = next(self._walk, (0, _NONE))
        if batch is _NONE:
            self.ended = True
            return None
        if self._held is not None:
            self._hold(batch)
        else:
            self._require_end()
            self._marks.append(_mark(batch))
        return batch

    def one(self, index: int) -> Any:
        """Return one of the batches met so far, and go no further: a loader may give the next in the same memory.

        Raises:
            StateError: it is not held, and the stream gives others now.
        """
        return next(batch for _, batch in self.again([index]))

    def again(self, wanted: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Yield the batches of these indices, which must rise, with the indices.

        Raises:
            StateError: they are not held, and the stream gives others now.
        """
        if self._held is not None:
            for index in wanted:
                self._require_unwritten(index)
                yield index, self._held[index]
            return
        left = list(wanted)
        walk = self._walk_anew()
        if not self.ended:
            self._walk = walk  # the old one may be over: a loader with persistent workers has one for all walks
        while left:
            index, batch = next(walk, (0, _NONE))
            if batch is _NONE:
                raise self._changed(left[0])
            if index == left[0]:
                left.pop(0)
                yield index, batch

    def _walk_anew(self) -> Iterator[tuple[int, Any]]:
        for index, batch in numbered("recalibrate", self._stream, allow_empty=True):
            if index < len(self._marks) and _mark(batch) != self._marks[index]:
                raise self._changed(index)
            yield index, batch

    def _hold(self, batch: Any) -> None:
        assert self._held is not None
        if not self._held:
            self._marks.append(_mark(batch))
        self._held.append(batch)
        self._versions.append(_versions(batch))
        if not isinstance(self._stream, list | tuple):  # there they are held anyway
            # each time that it comes, even if it is the same tensor again: a stream without end is to meet the limit
            self.nbytes += _OVERHEAD + sum(t.nbytes for t in tensors_of(batch))
        # what can be walked through again leaves half of the room to the runs
        if self.nbytes <= (self._limit if isinstance(self._stream, Iterator) else self._limit / 2):
            return
        if isinstance(self._stream, Iterator):
            raise StateError(
                f"recalibrate: a {type(self._stream).__name__} can be walked through only once, and its batches do not "
                f"fit into memory: {len(self._held)} of them count as {self.nbytes / 1e9:.2g} GB, "
                f"{self._limit / 1e9:.2g} GB are allowed. Pass a list or a DataLoader, fewer batches "
                "(itertools.islice), tolerance=0.01, a larger memory=, or order='parallel', which keeps no batch. The "
                "model is as it was."
            )
        self._require_unwritten(0)  # else the marks would be those of the last batch
        self._marks = [_mark(one) for one in self._held]
        self._most = max(_MOST_UNHELD, 10 * len(self._held))
        self._held = None
        self.nbytes = 0

    def _require_end(self) -> None:
        """Refuse a stream that does not tell its length and goes on and on.

        Raises:
            StateError: it does.
        """
        if len(self._marks) >= self._most and length_of(self._stream) is None:
            raise StateError(
                f"recalibrate: the stream tells no length (__len__), does not fit into memory "
                f"({self._limit / 1e9:.2g} GB are allowed), and has not ended after {len(self._marks)} batches; "
                "it may be endless. Pass fewer batches (itertools.islice), or tolerance=0.01. The model is as it was."
            )

    def _require_unwritten(self, index: int) -> None:
        assert self._held is not None
        batch = self._held[index]
        # what numpy writes, into the memory of a tensor, is not counted: there one batch stands for all
        if _versions(batch) != self._versions[index] or (index == 0 and _mark(batch) != self._marks[0]):
            raise StateError(
                f"recalibrate: the model writes into its input in place, or the loader gives every batch in the same "
                f"memory, so that batch {index} (counting from 0) is not what it was and cannot be run again. Give the "
                "model copies: forward=lambda model, batch: model(batch.clone()); a loader must make them itself: "
                "yield batch.clone(). The model is as it was."
            )

    def _changed(self, index: int) -> StateError:
        return StateError(
            f"recalibrate: the stream does not fit into memory ({self._limit / 1e9:.2g} GB are allowed), so it is "
            f"walked through several times, and batch {index} (counting from 0) was another one this time: it is "
            "shuffled, or changed at random. Keep the order and the data (shuffle=False, no augmentation), or pass "
            "fewer batches (itertools.islice), tolerance=0.01, a larger memory=, or order='parallel'. The model is as "
            "it was."
        )


_NONE = object()


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors in a batch."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _versions(batch: Any) -> list[int]:
    """Return how often each tensor has been written into; those of inference mode do not count that."""
    return [t._version for t in tensors_of(batch) if not t.is_inference()]


def _mark(batch: Any) -> int:
    """Return a number that tells batches apart."""
    mark = 0
    for t in tensors_of(batch):
        if t.is_meta or t.is_quantized or is_traceable_wrapper_subclass(t):
            continue  # without bytes of their own that could be read
        data = memoryview(bytes_of(t).cpu().numpy())  # type: ignore[arg-type]
        mark = zlib.crc32(repr((t.shape, t.dtype)).encode(), mark)
        mark = zlib.crc32(data, mark)
    return mark
