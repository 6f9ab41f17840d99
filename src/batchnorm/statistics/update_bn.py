"""``torch.optim.swa_utils.update_bn``, exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

from batchnorm.errors import EmptyStreamError
from batchnorm.models.calling import Forward
from batchnorm.models.preconditions import require_module
from batchnorm.nn.select import named_norms
from batchnorm.statistics.recalibrate import recalibrate
from batchnorm.statistics.result import MeasurementPlan, RecalibrateResult
from batchnorm.statistics.sites import NothingToMeasure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["update_bn"]


def update_bn(
    loader: Iterable[Any],
    model: Module,
    device: int | str | torch.device | None = None,
    *,
    order: Literal["sequential", "parallel"] = "sequential",
    estimator: Literal["pooled", "within"] = "pooled",
    names: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    tolerance: float | None = None,
    memory: int | float | str | None = None,
    cache: str | Path | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool | None = None,
) -> RecalibrateResult:
    r"""Measure the running statistics of an averaged model: a drop-in for ``torch.optim.swa_utils.update_bn``.

    Over all n values that a channel meets, however they are cut into batches:

    .. math::

        \mathrm{running\_mean} = \frac1n \sum_i x_i \qquad
        \mathrm{running\_var} = \frac1{n-1} \sum_i (x_i - \mathrm{running\_mean})^2

    (unbiased, divisor n − 1). It is :func:`batchnorm.recalibrate`, whose page tells what is exact, called as torch's
    function is. Torch's takes the plain mean of the batches' means and variances instead, so that a last batch of 2
    weighs as much as one of 64 and the variance between batches is left out; it switches Dropout on, overwrites norms
    that were frozen, and leaves a model half-changed after an exception. Where this differs on purpose:

    - an empty loader changes nothing and is a warning, where torch leaves mean 0 and variance 1 behind;
    - a dict holds keyword inputs, where torch passes it on as one argument (``forward`` does so here);
    - norms frozen by hand or by ``freeze`` keep their statistics; those of an ``AveragedModel`` are judged by the mode
      of the model inside it, for the wrapper itself is always made in train mode.

    Args:
        loader: batches: tensors, tuples or lists with the inputs first, or dicts of keyword inputs. A tensor holds them
            along its first dimension.
        model: the model, often a ``torch.optim.swa_utils.AveragedModel``.
        device: where the inputs are moved to first; None leaves them where they are.
        order: as for ``recalibrate``; torch's function measures as ``"parallel"`` does.
        estimator: as for ``recalibrate``.
        names: as for ``recalibrate``; of an ``AveragedModel``, the names in the model inside it.
        forward: how the model is called on a batch where the above does not fit; it is given the whole batch, moved.
        tolerance: as for ``recalibrate``.
        memory: as for ``recalibrate``.
        cache: as for ``recalibrate``.
        process_group: as for ``recalibrate``.
        progress: as for ``recalibrate``.

    Returns:
        The statistics before and after, and ``undo()``, where torch's function returns None. For a model without any
        batch norm, and for an empty loader, there is nothing to do, and the result is empty.

    Raises:
        BatchNormError: whatever ``recalibrate`` raises; the model is then bit-identical to before.

    Example:
        >>> import torch
        >>> from batchnorm.statistics import update_bn
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = AveragedModel(torch.nn.Sequential(torch.nn.BatchNorm1d(1)))
        >>> loader = [(torch.tensor([[1.0], [2.0]]), "label"), (torch.tensor([[6.0]]), "label")]
        >>> result = update_bn(loader, model)
        >>> model.module[0].running_mean, model.module[0].running_var
        (tensor([3.]), tensor([7.]))

    Source: Izmailov et al. 2018, arXiv 1803.05407, section 3.2 and Algorithm 1, last line.
    """
    require_module("update_bn", model)
    measured = model.module if isinstance(model, AveragedModel) else model

    def call(_: Module, batch: Any) -> Any:
        return _call(model, batch, device, forward)

    if isinstance(loader, Tensor) and loader.dim() > 0:
        loader = loader.unbind()
    try:
        return recalibrate(
            measured,
            loader,
            order=order,
            estimator=estimator,
            names=names,
            forward=call,
            tolerance=tolerance,
            memory=memory,
            cache=cache,
            process_group=process_group,
            progress=progress,
        )
    except NothingToMeasure:
        if named_norms(measured) or names is not None:
            raise
    except EmptyStreamError as error:
        warnings.warn(f"update_bn: {error} The statistics are as they were.", stacklevel=2)
    return RecalibrateResult.of_nothing(MeasurementPlan(order, estimator, tolerance, processes=1))


def _call(model: Module, batch: Any, device: int | str | torch.device | None, forward: Forward | None) -> Any:
    if forward is not None:
        return forward(model, _moved(batch, device))
    inputs = _moved(batch[0] if isinstance(batch, tuple | list) and batch else batch, device)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _moved(batch: Any, device: int | str | torch.device | None) -> Any:
    """Return a batch on the device: its tensors, and objects that know how to move (a packed sequence, a graph)."""
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)
