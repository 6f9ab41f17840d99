"""Context managers: wrong arguments are refused where one is made, and no interrupt prevents what ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import ParamSpec, TypeAlias

__all__ = ["block", "undone"]

_Parameters = ParamSpec("_Parameters")


_Generator: TypeAlias = Callable[_Parameters, Iterator[None]]
_Block: TypeAlias = Callable[_Parameters, AbstractContextManager[None]]


def block(check: Callable[_Parameters, None]) -> Callable[[_Generator[_Parameters]], _Block[_Parameters]]:
    """Make a context manager of a generator function, as ``contextlib.contextmanager`` does.

    The body of a generator runs when the block is entered: ``use("batch", model)`` without ``with`` would do nothing at
    all, whatever its arguments.

    Args:
        check: is called with the arguments in the call itself, and raises where they are wrong.

    Example:
        >>> def positive(x): assert x > 0, "expected a positive number"
        >>> @block(positive)
        ... def within(x):
        ...     yield
        >>> within(-1)
        Traceback (most recent call last):
            ...
        AssertionError: expected a positive number
    """

    def decorate(
        generator: Callable[_Parameters, Iterator[None]],
    ) -> Callable[_Parameters, AbstractContextManager[None]]:
        manager = contextmanager(generator)

        @wraps(generator)
        def make(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> AbstractContextManager[None]:
            check(*args, **kwargs)
            return manager(*args, **kwargs)

        return make

    return decorate


def undone(change: Callable[[], None], undo: Callable[[], None]) -> Iterator[None]:
    """Make a change for a block, and undo it however the block ends; again if an interrupt comes meanwhile.

    It is the body of a context manager's generator: ``yield from undone(change, undo)``. A ``with`` statement there
    would not do: an interrupt that comes as its ``__exit__`` begins prevents that.

    Args:
        change: may be interrupted, and fail.
        undo: must be able to undo half of the change, and do nothing the second time.

    Example:
        >>> from contextlib import contextmanager
        >>> open_now = set()
        >>> @contextmanager
        ... def opened(name):
        ...     yield from undone(lambda: open_now.add(name), lambda: open_now.discard(name))
        >>> with opened("a"):
        ...     print(open_now)
        {'a'}
        >>> open_now
        set()
    """
    try:
        change()
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise
