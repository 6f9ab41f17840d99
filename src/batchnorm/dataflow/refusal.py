"""Why something is left as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from batchnorm.dataflow.graph import Call

__all__ = ["Refusal", "listed"]


class Refusal(Exception):  # noqa: N818 - nothing went wrong
    """One norm cannot be folded; the message is the reason, in one sentence. It never leaves this package.

    Attributes:
        module: the qualified name of the module that cannot take it, where one module is the reason.
        calls: the operators that stand in the way, where operators are the reason.
    """

    def __init__(self, reason: str, module: str | None = None, calls: Sequence[Call] = ()) -> None:
        super().__init__(reason)
        self.module = module
        self.calls = tuple(calls)

    @staticmethod
    @contextmanager
    def at(*calls: Call) -> Iterator[None]:
        """Say of a refusal in the body that these operators stand in the way, if it does not say which itself."""
        try:
            yield
        except Refusal as refusal:
            refusal.calls = refusal.calls or calls
            raise


def listed(phrases: Sequence[str], most: int | None = None) -> str:
    """Return phrases in a row, for a sentence: at most so many by name.

    >>> listed(["a", "b"]), listed(["a", "b", "c"], most=2)
    ('a and b', 'a, b and 1 more')
    """
    if most is not None and len(phrases) > most:
        phrases = [*phrases[:most], f"{len(phrases) - most} more"]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
