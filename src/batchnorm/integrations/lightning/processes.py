"""A trainer of several processes: which of them measure together, and each one's part of the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.nn import Module, SyncBatchNorm
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from batchnorm.errors import StateError
from batchnorm.nn.freeze import is_frozen
from batchnorm.nn.select import named_norms
from batchnorm.statistics.buffers import written
from batchnorm.statistics.stream import part_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["buffers_of_rank_0", "each_sample_once", "group_of", "own_part", "require_one_network"]

# Strategies are known by name, for they may come from either of the two packages.
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


def group_of(trainer: Any) -> ProcessGroup | None:
    """Return the processes that measure together; None for one alone.

    Raises:
        StateError: they cannot measure together under the trainer's strategy.
    """
    strategy = trainer.strategy
    kinds, name = {cls.__name__ for cls in type(strategy).__mro__}, type(strategy).__name__
    instead = (
        "Train without the callback, then load the checkpoint in one process and call batchnorm.recalibrate(module, "
        "loader)."
    )
    if kinds & _SHARDED:
        raise StateError(
            f"RecalibrateCallback: the trainer's strategy is {name}, which divides the model itself among the "
            f"processes, so that none of them can run it by itself. {instead}"
        )
    if trainer.world_size == 1:
        return None
    if "DDPStrategy" not in kinds or not distributed.is_available() or not distributed.is_initialized():
        raise StateError(
            f"RecalibrateCallback: the trainer runs {trainer.world_size} processes under {name}; expected DDPStrategy "
            f"(strategy='ddp', 'ddp_spawn', 'ddp_fork'), whose processes can measure together. {instead}"
        )
    if type(getattr(strategy, "_ddp_comm_state", None)).__name__ == "PostLocalSGDState":
        raise StateError(
            "RecalibrateCallback: under PostLocalSGD the weights of the processes differ between two averagings, so "
            f"that they do not measure the same model. {instead}"
        )
    return distributed.group.WORLD


def require_one_network(trainer: Any, module: Module, measured: Collection[str]) -> None:
    """Refuse norms whose statistics nobody makes equal: the measured ones would meet another network in each process.

    Raises:
        StateError: there are such norms.
    """
    if trainer.world_size == 1 or getattr(trainer.strategy.model, "broadcast_buffers", True):
        return
    apart = [
        name
        for name, norm in named_norms(module).items()
        if name not in measured and norm.training and norm.running_mean is not None
        if not is_frozen(norm) and not isinstance(norm, SyncBatchNorm)
    ]
    if apart:
        raise StateError(
            f"RecalibrateCallback: {apart[0]} is not among names=, and under broadcast_buffers=False it has other "
            "statistics in each process, so that the norms that are measured would meet different networks. Measure "
            "all norms (names=None), freeze it, or leave broadcast_buffers as it is."
        )


@contextmanager
def buffers_of_rank_0(trainer: Any, module: Module) -> Iterator[None]:
    """Give every process the buffers of rank 0, as DDP does before each step; take them back if the body fails.

    After the last step each process has the statistics of its own batch. Those that are not measured would be
    different ones in every process, and the norms behind them would meet different data.
    """
    wrapper = trainer.strategy.model
    if trainer.world_size == 1 or not getattr(wrapper, "broadcast_buffers", False):
        yield
        return
    kept_apart = set(wrapper.parameters_to_ignore)
    buffers = [buffer for name, buffer in module.named_buffers() if name not in kept_apart]
    theirs = [buffer.detach().clone(memory_format=torch.contiguous_format) for buffer in buffers]
    for value in theirs:
        distributed.broadcast(value, 0)
    with written(list(zip(buffers, theirs, strict=True))):
        yield


@contextmanager
def each_sample_once(stream: Any) -> Iterator[None]:
    """Leave out, while the body runs, what a DistributedSampler repeats to give all processes as many samples.

    Training needs as many steps in each; a measurement does not, and samples that count twice would bias it.
    """
    found = (stream, getattr(stream, "batch_sampler", None))
    samplers: dict[int, Any] = {id(sampler): sampler for sampler in (getattr(one, "sampler", None) for one in found)}
    padded = [sampler for sampler in samplers.values() if _repeats(sampler)]
    before = [(sampler, sampler.total_size, sampler.num_samples) for sampler in padded]
    try:
        for sampler in padded:
            sampler.total_size = len(sampler.dataset)
            sampler.num_samples = len(range(sampler.rank, sampler.total_size, sampler.num_replicas))
        yield
    finally:
        for sampler, total_size, num_samples in before:
            sampler.total_size, sampler.num_samples = total_size, num_samples


def _repeats(sampler: Any) -> bool:
    # one by another author may count its samples in another way
    known = type(sampler) is DistributedSampler or type(sampler).__name__ == "DistributedSamplerWrapper"
    return known and not sampler.drop_last


def own_part(trainer: Any, stream: Iterable[Any]) -> Iterable[Any]:
    """Return this process's part of a stream that the trainer has not divided yet."""
    if trainer.world_size == 1:
        return stream
    if isinstance(stream, DataLoader):
        # as the trainer divides its own, or leaves them as they are; there is no public way to ask it
        shuffle = isinstance(stream.sampler, RandomSampler)
        divided: Iterable[Any] = trainer._data_connector._prepare_dataloader(stream, shuffle, trainer.state.stage)
        return divided
    return part_of(stream, first=trainer.global_rank, every=trainer.world_size)
