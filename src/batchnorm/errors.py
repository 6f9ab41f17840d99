"""Every error that the library raises on purpose.

Each message says where, what was expected, what came, and what to do. The classes that stand in for an error of
``torch.nn`` also inherit the built-in class that torch raises there, so that existing ``except`` clauses keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from batchnorm.harmless import harmless

__all__ = [
    "ArgumentTypeError",
    "BatchError",
    "BatchNormError",
    "EmptyStreamError",
    "InputError",
    "NonFiniteError",
    "ShapeError",
    "StateError",
    "UnknownNameError",
    "UnsupportedDtypeError",
    "VerificationError",
]


class BatchNormError(Exception):
    """Base of every error of this library; catching it catches them all."""

    def __str__(self) -> str:
        """Return the message, in which names of layers and of what is in files may stand."""
        return harmless(super().__str__(), lines=True)


class ShapeError(BatchNormError, ValueError):
    """A tensor or a number has a shape or value that the call cannot use (torch raises ``ValueError`` there)."""


class ArgumentTypeError(BatchNormError, TypeError):
    """An argument is of a type that the call does not take."""


class InputError(BatchNormError, RuntimeError):
    """Tensors do not fit together: sizes, dtypes or devices (torch raises ``RuntimeError`` there)."""


class UnsupportedDtypeError(InputError, NotImplementedError):
    """A tensor is of a dtype that cannot be normalized (torch raises ``NotImplementedError`` there)."""


class NonFiniteError(BatchNormError, ValueError):
    """A batch holds NaN or infinity where statistics are taken."""


class EmptyStreamError(BatchNormError, ValueError):
    """A stream of batches ended before the first one."""


class BatchError(BatchNormError, RuntimeError):
    """The model, or the loader, failed on one of the batches of a stream; the cause is chained."""


class StateError(BatchNormError, RuntimeError):
    """A model is not in a state in which the call makes sense (no statistics kept, undo called twice, ...)."""


class UnknownNameError(BatchNormError, KeyError):
    """A name does not belong to any norm, rule or file entry; the message lists the closest ones."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        """Return the message itself."""
        return harmless(str(self.args[0]), lines=True) if self.args else ""


class VerificationError(BatchNormError, ArithmeticError):
    """A rewritten model does not agree with the original within the stated bound; it is not returned."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a mistyped name: ``"; did you mean 'bn1'?"``, or ``""`` when nothing is near.

    >>> closest("layer1.bn", ["layer1.bn1", "stem.bn"])
    "; did you mean 'layer1.bn1'?"
    >>> closest("4", ["module.1", "module.4"])
    "; did you mean 'module.4'?"
    """
    every = list(known)
    inside = [one for one in every if name and one.endswith(f".{name}")]  # of a model that is wrapped now
    near = inside[:1] or difflib.get_close_matches(name, every, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
