"""Writing several tensors as one: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from batchnorm.models.snapshot import Values, restored_if_raised, write

__all__ = ["write_all", "written"]


def write_all(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each value into its tensor, in place; if one write fails, those before it are taken back bit for bit."""
    with written(changes):
        pass


@contextmanager
def written(changes: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Do so before the body, and take all of it back if the body raises."""
    with restored_if_raised(Values(tensor for tensor, _ in changes)):
        for tensor, value in changes:
            write(tensor, value.view_as(tensor))
        yield
