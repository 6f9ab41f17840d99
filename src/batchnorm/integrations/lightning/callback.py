"""The callback that a Lightning trainer measures a module by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from batchnorm.errors import ArgumentTypeError, BatchNormError, ShapeError, StateError
from batchnorm.integrations.lightning.package import base_class
from batchnorm.integrations.lightning.processes import (
    buffers_of_rank_0,
    each_sample_once,
    group_of,
    own_part,
    require_one_network,
)
from batchnorm.models.calling import Forward, call_on_batch
from batchnorm.models.preconditions import lazy_names
from batchnorm.statistics.memory import limit_of
from batchnorm.statistics.recalibrate import plan_of, recalibrate
from batchnorm.statistics.result import RecalibrateResult
from batchnorm.statistics.sequential.disk_cache import DiskCache
from batchnorm.statistics.sites import Sites
from batchnorm.statistics.stream import part_of, require_stream

__all__ = ["RecalibrateCallback"]

_Callback: Any = base_class()


class RecalibrateCallback(_Callback):  # type: ignore[misc]  # lightning is not there when the types are checked
    r"""Measures the population statistics of a LightningModule at the end of training, and before validation.

    Over all n values that a channel meets in the training data (the moments of :func:`batchnorm.recalibrate`):

    .. math::

        \mathrm{running\_mean} = \frac1n \sum_i x_i \qquad
        \mathrm{running\_var} = \frac1{n-1} \sum_i (x_i - \mathrm{running\_mean})^2

    (unbiased, divisor n − 1). The batches are those of the training loader, taken through the module's and the data
    module's transfer hooks to its device, under the trainer's precision. Norms that are frozen keep their statistics.
    What is measured is what the module holds when the hook runs: behind ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the list of callbacks, the averaged weights. An ``AveragedModel`` that another
    callback holds, with the same parameters, is given the same statistics, so that later checkpoints and validation
    runs have them.

    **Several processes.** Those of ``DDPStrategy`` measure together: each runs its part of the data, and all end with
    the same bits. If one fails, all raise, and none is changed. What a ``DistributedSampler`` repeats, so that all have
    as many samples, is left out: each sample counts once. Buffers that are not measured become those of rank 0 first,
    as DDP makes them before each step; with ``broadcast_buffers=False``, which keeps them apart, norms that are not
    measured are refused.

    Args:
        before_validation: measure before each validation in ``fit`` too, so that it is validated, and by a
            ``ModelCheckpoint`` saved, with statistics that fit the weights of that moment. Training goes on from them.
        num_batches: how many batches a measurement takes in each process; None takes as many as an epoch of training
            has there.
        dataloader: other batches than those of the training loader. Of several processes each takes its part: of a
            ``DataLoader``, what the trainer would give it of a training loader; of any other iterable, its turns.
        save: where ``trainer.save_checkpoint`` writes a checkpoint after the measurement at the end of training. Those
            that ``ModelCheckpoint`` wrote at the end of an epoch are older than it. If that measurement fails, the
            checkpoint is written all the same, with the statistics that training left, and the error says so.
        order: as for ``recalibrate``.
        estimator: as for ``recalibrate``.
        names: as for ``recalibrate``.
        forward: as for ``recalibrate``; it is given a batch that was moved.
        tolerance: as for ``recalibrate``.
        memory: as for ``recalibrate``.
        cache: as for ``recalibrate``.
        progress: as for ``recalibrate``, in rank 0 only; off, for Lightning shows bars of its own.

    Attributes:
        result: the last measurement, with its ``undo()``; None before the first. It lives in the process that trained:
            ``"ddp_spawn"`` and ``"ddp_fork"`` bring the module's weights and buffers back from there, no more.

    Raises:
        ArgumentTypeError, BatchError, ShapeError, UnknownNameError: an option makes no sense, or there is no such
            folder as ``cache``.
        StateError: there is no norm to measure, or all are frozen; a loader is a generator, which is over when it is
            needed once more; the trainer's strategy divides the model among the processes, as FSDP and DeepSpeed do, or
            is not known to let them measure together; the callback stands before one that averages weights; there are
            several training loaders; or, with ``before_validation``, the loader keeps its workers, so that it cannot be
            walked through a second time while an epoch is under way. All of these before the first step of training.

    Example::

        import lightning.pytorch as lightning
        from lightning.pytorch.callbacks import EMAWeightAveraging
        from batchnorm.integrations.lightning import RecalibrateCallback

        callbacks = [EMAWeightAveraging(), RecalibrateCallback(num_batches=200, save="ema.ckpt")]
        lightning.Trainer(callbacks=callbacks).fit(module, loader)

    Source: Izmailov et al. 2018, arXiv 1803.05407, section 3.2; Wu & Johnson 2021, arXiv 2105.07576, section 3.
    """

    def __init__(
        self,
        *,
        before_validation: bool = False,
        num_batches: int | None = None,
        dataloader: Iterable[Any] | None = None,
        save: str | Path | None = None,
        order: Literal["sequential", "parallel"] = "sequential",
        estimator: Literal["pooled", "within"] = "pooled",
        names: str | Sequence[str] | None = None,
        forward: Forward | None = None,
        tolerance: float | None = None,
        memory: int | float | str | None = None,
        cache: str | Path | None = None,
        progress: bool | None = False,
    ) -> None:
        super().__init__()
        if num_batches is not None and not isinstance(num_batches, int):
            raise ArgumentTypeError(
                f"RecalibrateCallback: num_batches: expected an integer or None; got {type(num_batches).__name__}."
            )
        if num_batches is not None and num_batches < 1:
            raise ShapeError(f"RecalibrateCallback: num_batches: expected 1 or more; got {num_batches}.")
        plan_of(order, estimator, tolerance)
        if dataloader is not None:
            require_stream("RecalibrateCallback", dataloader)
        self.before_validation = before_validation
        self.num_batches = num_batches
        self.dataloader = dataloader
        self.save = save
        self.order: Literal["sequential", "parallel"] = order
        self.estimator: Literal["pooled", "within"] = estimator
        self.names = names
        self.forward = call_on_batch if forward is None else forward
        self.tolerance = tolerance
        self.memory = memory
        self.cache = cache
        self.progress = progress
        self.result: RecalibrateResult | None = None
        self._training_modes: list[tuple[Module, bool]] = []

    # -- what the trainer calls --------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse, before anything is trained, what could not be measured after it."""
        if stage != "fit":
            return
        group_of(trainer)
        limit_of(self.memory, pl_module)
        if self.cache is not None:
            with DiskCache(self.cache):
                pass
        # one that another callback calls is not in the list, and its place is that one's affair
        mine = next((i for i, each in enumerate(trainer.callbacks) if each is self), len(trainer.callbacks))
        later = next((c for c in trainer.callbacks[mine + 1 :] if _averages_weights(c)), None)
        if later is not None:
            raise StateError(
                f"RecalibrateCallback: stands before {type(later).__name__} in the list of callbacks, so that it would "
                "measure the weights before they are averaged. Put it behind."
            )
        if self.before_validation and _is_walked_once(self.dataloader):
            raise StateError(
                f"RecalibrateCallback: dataloader: a {type(self.dataloader).__name__} can be walked through only once, "
                "and before_validation=True measures several times. Pass a list or a DataLoader."
            )
        if self.save is not None and Path(self.save).is_dir():
            raise StateError(f"RecalibrateCallback: save={str(self.save)!r} is a folder; expected the path of a file.")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look for the norms, now that the module is configured and its checkpoint is loaded."""
        if lazy_names(pl_module):
            return  # the first batch tells what they are
        sites = Sites(pl_module, self.names)
        require_one_network(trainer, pl_module, {site.name for site in sites.known})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the loader while nothing is lost yet."""
        loader = self._loader(trainer)
        if self.dataloader is None and _is_walked_once(loader):
            raise StateError(
                f"RecalibrateCallback: the training loader is a {type(loader).__name__}, which can be walked through "
                "only once, so that training leaves nothing to measure on. Train on a list or a DataLoader, or pass "
                "dataloader= a loader of its own."
            )
        keeps_workers = getattr(loader, "persistent_workers", False) and self.dataloader is None
        if self.before_validation and keeps_workers:
            raise StateError(
                "RecalibrateCallback: before_validation=True would start the training loader a second time in the "
                "middle of an epoch, and with persistent_workers=True that ends the epoch's own pass. Pass "
                "dataloader= a loader of its own."
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Remember the modes: those that the user froze by hand cannot be message apart once all are in eval mode."""
        if self.before_validation:
            self._training_modes = [(module, module.training) for module in pl_module.modules()]

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure, if asked to; not in the sanity check, nor in ``trainer.validate``."""
        if not self.before_validation or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        modes = [(module, module.training) for module in pl_module.modules()]
        try:
            _set(self._training_modes)
            self._recalibrate(trainer, pl_module)
        finally:
            _set(modes)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, hand the statistics on, and save."""
        self._training_modes = []
        try:
            self._recalibrate(trainer, pl_module)
        except BaseException as error:
            if self.save is None:
                raise
            trainer.save_checkpoint(self.save)  # training was not for nothing
            if not isinstance(error, BatchNormError):
                raise
            message = f"{error} The trained weights, with the statistics that training left, were saved to {self.save}."
            raise type(error)(message) from error
        for callback in trainer.callbacks:
            for held in getattr(callback, "__dict__", {}).values():
                if isinstance(held, AveragedModel):
                    _hand_on(pl_module, held.module)
        if self.save is not None:
            trainer.save_checkpoint(self.save)

    # -- how it is done ----------------------------------------------------------------------------------------------

    def _recalibrate(self, trainer: Any, pl_module: Any) -> None:
        most = self.num_batches
        if most is None and self.dataloader is None and math.isfinite(trainer.num_training_batches):
            most = int(trainer.num_training_batches)
        precision = trainer.precision_plugin

        def call(module: Module, batch: Any) -> Any:
            # as the training loop does it; the private method finds the hook, which the data module may override
            batch = pl_module._on_before_batch_transfer(precision.convert_input(batch), dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with precision.forward_context():
                return self.forward(module, batch)

        loader = self._loader(trainer)
        with buffers_of_rank_0(trainer, pl_module), each_sample_once(loader):
            self.result = recalibrate(
                pl_module,
                part_of(loader, most=most),
                order=self.order,
                estimator=self.estimator,
                names=self.names,
                forward=call,
                tolerance=self.tolerance,
                memory=self.memory,
                cache=self.cache,
                process_group=group_of(trainer),
                progress=self.progress if trainer.is_global_zero else False,
            )

    def _loader(self, trainer: Any) -> Iterable[Any]:
        """Return what this process measures on."""
        if self.dataloader is not None:
            return own_part(trainer, self.dataloader)
        loader: Any = trainer.train_dataloader
        if isinstance(loader, dict | list | tuple):
            raise StateError(
                f"RecalibrateCallback: there are {len(loader)} training loaders. Pass the one to measure on, or one "
                "that joins them: dataloader=..."
            )
        found: Iterable[Any] = loader
        return found


def _averages_weights(callback: Any) -> bool:
    names = {cls.__name__ for cls in type(callback).__mro__}
    return not names.isdisjoint({"WeightAveraging", "StochasticWeightAveraging"})


def _set(modes: Iterable[tuple[Module, bool]]) -> None:
    for module, training in modes:
        module.training = training  # the attribute itself: train() may be overridden


def _is_walked_once(stream: Any) -> bool:
    """Return whether a stream is over after one walk: a generator, a map, a zip, a slice of itertools.

    Iterators of other authors often begin anew (those of DALI do).
    """
    return isinstance(stream, Iterator) and type(stream).__module__ in ("builtins", "itertools")


def _hand_on(measured: Module, average: Module) -> None:
    """Give an average the buffers of the model that it was copied into; one of other weights is left alone."""
    ours, theirs = dict(measured.named_parameters()), dict(average.named_parameters())
    if ours.keys() != theirs.keys() or not all(_same(ours[name], theirs[name]) for name in ours):
        return
    measured_buffers = dict(measured.named_buffers())
    with torch.no_grad():
        for name, buffer in average.named_buffers():
            value = measured_buffers.get(name)
            if value is not None and value.shape == buffer.shape:
                buffer.copy_(value)


def _same(one: Tensor, other: Tensor) -> bool:
    if is_lazy(one) or is_lazy(other) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.to(other.device), other)
