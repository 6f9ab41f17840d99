"""Context managers that refuse wrong arguments where they are made, not first where they are entered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import ParamSpec, TypeAlias

__all__ = ["block"]

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
