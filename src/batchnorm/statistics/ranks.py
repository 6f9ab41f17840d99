"""Several processes that measure one stream together, each on its part of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from batchnorm.errors import ArgumentTypeError, BatchError, StateError
from batchnorm.statistics.stream import in_one_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Alone", "Ranks", "Together", "ranks_of"]


class Ranks(Protocol):
    """The processes that measure together."""

    rank: int
    size: int

    def agree(self, value: Any) -> list[Any]:
        """Return what every process gave, in the order of their ranks; all of them must come here."""

    def failing_together(self) -> Any:
        """Return a context in which an exception in one process becomes one in all of them."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def agree(self, value: Any) -> list[Any]:
        """Return the value, as that of the only process."""
        return [value]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Do nothing."""
        yield


class Together:
    """The processes of a torch.distributed group: gloo, nccl, or any other that gathers.

    There is one kind of exchange, in which each process gives a value or says that it failed. So processes cannot wait
    for each other in different exchanges, and a failure reaches all of them at the next one.
    """

    def __init__(self, group: ProcessGroup) -> None:
        from torch import distributed

        self._distributed = distributed
        self._group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        self._told = False

    def agree(self, value: Any) -> list[Any]:
        """Return what every process gave, in the order of their ranks.

        Raises:
            BatchError: another process failed, or is gone.
        """
        replies = self._gather((None, value))
        failures = [f"rank {rank}: {failure}" for rank, (failure, _) in enumerate(replies) if failure is not None]
        if failures:
            self._told = True
            raise BatchError(
                f"recalibrate: another process failed ({'; '.join(failures)}). The model is as it was in every process."
            )
        return [value for _, value in replies]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the others of an exception in the body, so that they raise one too."""
        try:
            yield
        except BaseException as error:
            if not self._told:
                with suppress(BatchError):  # the others are gone: there is nobody to tell
                    self._gather((in_one_line(error), None))
            raise

    def _gather(self, message: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
        replies: list[Any] = [None] * self.size
        try:
            self._distributed.all_gather_object(replies, message, group=self._group)
        except RuntimeError as error:
            self._told = True
            raise BatchError(
                f"recalibrate: the other processes cannot be reached any more ({in_one_line(error)} One of them may "
                "have been killed.) The model is as it was in this process."
            ) from error
        return replies


def ranks_of(process_group: ProcessGroup | None) -> Ranks:
    """Return the processes of a group, or this one alone.

    Raises:
        StateError: torch.distributed is not there, or this process is not part of the group.
        ArgumentTypeError: it is no process group.
    """
    from torch import distributed

    if process_group is None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            warnings.warn(
                f"recalibrate: torch.distributed runs {distributed.get_world_size()} processes, and this one measures "
                "by itself. If each has a part of the data, or of it a shuffled order, they end with different "
                "statistics: pass process_group=torch.distributed.group.WORLD, in all of them.",
                stacklevel=4,  # the caller of recalibrate, which is a transaction
            )
        return Alone()
    if not distributed.is_available() or not distributed.is_initialized():
        raise StateError(
            "recalibrate: process_group is given, but torch.distributed is not initialized. Call "
            "torch.distributed.init_process_group() first, or run alone: process_group=None."
        )
    outside: Any = distributed.GroupMember.NON_GROUP_MEMBER
    if process_group is outside:
        raise StateError("recalibrate: this process is not a member of process_group; call it in its members only.")
    if not isinstance(process_group, distributed.ProcessGroup):
        raise ArgumentTypeError(
            f"recalibrate: process_group: expected a torch.distributed.ProcessGroup, such as "
            f"torch.distributed.group.WORLD; got {type(process_group).__name__}."
        )
    return Together(process_group)
