"""One step of the running statistics for several micro-batches, as if they had been one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, SyncBatchNorm

from batchnorm.blocks import block
from batchnorm.errors import StateError
from batchnorm.kernels.contract import Counters
from batchnorm.kernels.running_statistics import update_running
from batchnorm.moments import Moments, expand_mask
from batchnorm.nn.redirect import Redirection, norms_for, redirected, require_arguments, set_aside
from batchnorm.nn.select import NormModule
from batchnorm.nn.statistics_in_use import updates
from batchnorm.observers import recomputing
from batchnorm.statistics.buffers import write_all

__all__ = ["accumulated_update"]


def _check(model: Module, names: str | Sequence[str] | None = None) -> None:
    require_arguments("accumulated_update", model, names)


@block(_check)
def accumulated_update(model: Module, names: str | Sequence[str] | None = None) -> Iterator[None]:
    r"""Take one step of the running statistics at the end of the block, with the moments of all its micro-batches.

    .. math::

        r \leftarrow (1 - \mathrm{momentum})\,r + \mathrm{momentum}\,b, \qquad
        b = \Big(\mathrm{mean},\; \tfrac{1}{n-1} \sum_i (x_i - \mathrm{mean})^2\Big)

    over the n values of all micro-batches together: the unbiased variance, divisor n − 1, with what is *between* the
    micro-batches in it. Put the block around the micro-batches of one optimizer step. Each of them is normalized by its
    own statistics as ever (gradients of a large batch would need all of it at once), but the running statistics move as
    they would for one large batch: once, by ``momentum``, and ``num_batches_tracked`` by 1.

    The moments are those that the norms compute anyway, rounded to the dtype of their buffers, and merge in float64
    (:class:`~batchnorm.moments.Moments`); nothing waits for the device. A channel's part in a micro-batch that is not
    finite does not enter. A micro-batch run again by a checkpoint is not counted twice. If the block raises, the
    statistics are what they were. Calls in all threads count; a call that ends after the block has does not. One thread
    at a time can be in a block for a norm.

    It works on torch's norms and this library's, with masks too, and on subclasses that normalize once a call. Norms in
    eval mode, frozen ones and those without running statistics go on as they are. Nesting, threads, compiled code,
    models without norms and copies are as for :func:`batchnorm.no_update`; of the two the innermost decides.

    Args:
        model: any model, or a norm itself.
        names: which norms, as for :func:`batchnorm.freeze`; None for all.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        StateError: the model holds scripted norms, or is ``DataParallel``; or the block is entered in compiled code
            while a norm is in train mode; or a ``SyncBatchNorm`` synchronizes several processes, whose counts are not
            known here; or another thread is in such a block.
        UnknownNameError: a name means no norm.

    Example:
        >>> import batchnorm, torch
        >>> norm = torch.nn.BatchNorm1d(1, momentum=1.0)
        >>> with batchnorm.accumulated_update(norm):
        ...     for micro_batch in torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]):
        ...         y = norm(micro_batch)
        >>> norm.running_mean, norm.running_var, norm.num_batches_tracked
        (tensor([4.]), tensor([6.6667]), tensor(1))

    Source: Chan, Golub & LeVeque 1979, eq. 2.1; Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 2, step 10.
    """
    norms = norms_for("accumulated_update", model, names, lambda norm: not norm.training)
    if not norms:
        yield
        return
    for name, norm in norms.items():
        _require_one_process(name, norm)
    rule = _Accumulation()
    yield from redirected(dict.fromkeys(norms.values(), rule))
    rule.commit()


def _require_one_process(name: str, norm: NormModule) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(norm, SyncBatchNorm) and distributed and torch.distributed.get_world_size(norm.process_group) > 1:
        raise StateError(
            f"accumulated_update: {name or type(norm).__name__} is SyncBatchNorm over several processes, and how many "
            "values the others had is not known here. Name other norms."
        )


class _Accumulation:
    """The moments that each norm has met since the block began."""

    axis = "update"

    def __init__(self) -> None:
        self._met: dict[NormModule, Moments] = {}
        self._lock = threading.Lock()
        self._thread = threading.current_thread()

    def require(self, others: Sequence[Redirection]) -> None:
        """Refuse a second block in another thread: each would take in a part of the other's micro-batches.

        Raises:
            StateError: there is one.
        """
        if any(isinstance(other, _Accumulation) and other._thread is not self._thread for other in others):
            raise StateError(
                "accumulated_update: another thread is in such a block for this model, and takes in what all threads "
                "call the model on. Open one block around the threads' work, or one after the other."
            )

    def apply(self, norm: NormModule, stand_in: NormModule, inputs: Mapping[str, Any]) -> Callable[[], None] | None:
        """Let the call write its moments where they can be fetched from: a step of momentum 1 takes all of a batch."""
        if not updates(norm, stand_in) or recomputing():
            if stand_in.training:
                set_aside(stand_in)
            return None
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        # a negative variance says that nothing was written: this library's layers write nothing that is not finite
        scratch = {"running_mean": torch.zeros_like(mean), "running_var": torch.full_like(var, -1.0)}
        if norm.num_batches_tracked is not None:
            scratch["num_batches_tracked"] = norm.num_batches_tracked.clone()
        stand_in.__dict__["_buffers"] = {**norm._buffers, **scratch}
        stand_in.__dict__["momentum"] = 1.0
        stand_in.__dict__["fused"] = False  # an output that waits would leave the moments to be written later

        def fetch() -> None:
            batch = _moments(inputs, scratch["running_mean"], scratch["running_var"])
            with self._lock:
                met = self._met.get(norm)
                self._met[norm] = batch if met is None else met.merge(batch)

        return fetch

    def commit(self) -> None:
        """Take the step, in all norms or in none."""
        changes: list[tuple[Tensor, Tensor]] = []
        with self._lock:  # a thread that is still in a call may be about to add to it
            met = dict(self._met)
        for norm, moments in met.items():
            buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            device = moments.count.device
            mean, var, batches = (None if b is None else b.detach().to(device, copy=True) for b in buffers)
            if mean is None or var is None:
                continue
            momentum: float | Tensor | None = norm.momentum
            if momentum is None:
                momentum = 0.0 if batches is None else 1 / (batches.double() + 1)
            update_running(mean, var, moments, momentum, Counters(batches))
            pairs = zip(buffers, (mean, var, batches), strict=True)
            changes += [(buffer, new) for buffer, new in pairs if buffer is not None and new is not None]
        write_all(changes)


@torch.no_grad()
def _moments(inputs: Mapping[str, Any], mean: Tensor, var: Tensor) -> Moments:
    """Return the moments that a call has written, of no values in channels where they are not finite or not there."""
    x, mask = inputs["input"], inputs.get("mask")
    device = "cpu" if mean.device.type == "mps" else mean.device  # which has no float64
    mean, var = mean.to(device).double(), var.to(device).double()
    if mask is None:
        count = torch.full_like(mean, x.numel() // mean.numel())
    else:
        count = expand_mask(mask, x, 1).sum([0, *range(2, x.dim())]).to(device).double()
    there = torch.isfinite(mean) & torch.isfinite(var) & (var >= 0)
    return Moments(
        torch.where(there, count, 0.0),
        torch.where(there, mean, 0.0),
        torch.where(there, var * (count - 1), 0.0),
    )
