"""A stream of batches that somebody else made: what it may be, and how its failures are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

from torch import Tensor
from torch.nn import Module

from batchnorm.errors import ArgumentTypeError, BatchError, EmptyStreamError
from batchnorm.nn.provenance import saw

__all__ = ["empty_stream", "in_one_line", "length_of", "numbered", "part_of", "require_stream"]


def require_stream(verb: str, batches: Any) -> None:
    """Refuse what is not a stream of batches, or is one only by accident.

    Raises:
        ArgumentTypeError: ``batches`` is a single batch, or nothing that can be walked through.
    """
    if isinstance(batches, Tensor | Mapping):
        kind = f"one tensor of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else "one dict"
        raise ArgumentTypeError(
            f"{verb}: expected batches, an iterable of them; got {kind}, which would be walked through sample by "
            "sample or key by key. Put it into a list: [batch]."
        )
    if isinstance(batches, str | bytes | Module) or not (
        hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    ):
        raise ArgumentTypeError(
            f"{verb}: expected batches, such as a DataLoader, a list or a generator; got {type(batches).__name__}."
        )


def length_of(batches: Any) -> int | None:
    """Return how many batches there are, or None where the stream does not tell."""
    try:
        return len(batches)
    except Exception:  # a loader over an iterable dataset has a __len__ that raises whatever the dataset raises
        return None


def part_of(batches: Iterable[Any], *, first: int = 0, every: int = 1, most: int | None = None) -> Iterable[Any]:
    """Return every n-th batch from the first one on, and no more than so many.

    It can be walked through as often as the stream, and gives then what the stream gives then. Batches in between are
    made and thrown away.

    >>> list(part_of(range(10), first=1, every=3, most=2))
    [1, 4]
    """
    if (first, every, most) == (0, 1, None):
        return batches
    part = _Part(batches, first, every, most)
    return iter(part) if isinstance(batches, Iterator) else part


class _Part:
    def __init__(self, batches: Iterable[Any], first: int, every: int, most: int | None) -> None:
        self._batches = batches
        self._turns = (first, None, every)
        self._most = most

    def __iter__(self) -> Iterator[Any]:
        return islice(islice(iter(self._batches), *self._turns), self._most)


def numbered(verb: str, batches: Any, *, allow_empty: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield each batch with its index, from 0.

    Raises:
        BatchError: the loader failed; the message says at which batch, the cause is chained.
        EmptyStreamError: there was no batch at all.
    """
    iterator = _guarded(verb, 0, iter, batches)
    for index in count():
        batch = _guarded(verb, index, next, iterator, _END)
        if batch is _END:
            break
        if index == 0:
            saw(batch)
        yield index, batch
    if index == 0 and not allow_empty:
        raise empty_stream(verb, type(batches).__name__)


def empty_stream(verb: str, kind: str) -> EmptyStreamError:
    """Return the error of a stream that gave nothing."""
    return EmptyStreamError(
        f"{verb}: expected at least one batch; the {kind} gave none. A generator can be walked "
        "through only once: make it anew, or pass a list or a DataLoader."
    )


_END = object()


def _guarded(verb: str, index: int, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        raise BatchError(
            f"{verb}: the loader failed to give batch {index} (counting from 0): {in_one_line(error)} "
            "The model is as it was; mend the loader and run again."
        ) from error


def in_one_line(error: BaseException) -> str:
    r"""Return type and first line of an error, as a sentence.

    >>> in_one_line(ValueError("no such file\nand more"))
    'ValueError: no such file.'
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
