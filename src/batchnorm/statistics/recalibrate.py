"""Population statistics of a model's norms, from a stream of data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.nn import Module

from batchnorm.errors import ShapeError, UnknownNameError, closest
from batchnorm.models.calling import Forward, call_on_batch
from batchnorm.models.preconditions import require_module
from batchnorm.models.snapshot import set_eval, untouched
from batchnorm.models.transaction import claim, transaction
from batchnorm.models.unsynchronized import unsynchronized
from batchnorm.nn.provenance import with_provenance
from batchnorm.nn.redirect import overlooked
from batchnorm.report.progress import progress_bar
from batchnorm.statistics.agreement import agree
from batchnorm.statistics.estimators import ESTIMATORS
from batchnorm.statistics.finish import finish
from batchnorm.statistics.memory import limit_of
from batchnorm.statistics.parallel import measure_in_parallel
from batchnorm.statistics.ranks import ranks_of
from batchnorm.statistics.result import MeasurementPlan, RecalibrateResult
from batchnorm.statistics.sequential.measure import Sequential
from batchnorm.statistics.sites import Sites
from batchnorm.statistics.stream import length_of, require_stream

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["plan_of", "recalibrate"]

ORDERS = ["sequential", "parallel"]


@transaction("recalibrate", lambda _: ())  # it claims the model when what it raises reaches all processes
@with_provenance("recalibrate")
def recalibrate(
    model: Module,
    batches: Iterable[Any],
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
    r"""Replace the running statistics of a model's batch norms by the population statistics of a stream of data.

    Over all n values that a channel of a norm meets, whatever batches they come in:

    .. math::

        \mathrm{running\_mean} = \frac1n \sum_i x_i \qquad
        \mathrm{running\_var} = \frac1{n-1} \sum_i (x_i - \mathrm{running\_mean})^2

    (``estimator="pooled"``; unbiased, divisor n − 1, as PyTorch keeps it). ``estimator="within"`` is the paper's
    Algorithm 2: the mean over batches of the batch means, and the mean over batches of their unbiased variances
    (divisor m − 1), all batches weighing the same whatever their size; it leaves out the variance between the batch
    means, and batches with a single value per channel. Sums are kept in float64 and merged by Chan's formula.
    ``num_batches_tracked`` becomes the number of batches that the norm met.

    **The order.** What a deep norm meets depends on the norms before it. With ``order="sequential"`` each is measured
    while all earlier ones are on their final statistics, rounded as they are stored: every norm's buffers hold the
    exact moments of what it will meet in eval mode on this stream, however it is cut into batches. The batches wait for
    each other at every norm, each in a thread of its own, only one of which runs at a time; so it costs about one
    forward pass over the stream. Small batches are joined, where the model is seen to treat them as it does single
    ones. Waiting takes the memory of what they hold meanwhile: beyond ``memory``, batches are put
    into a folder on disk (``cache``), or run again from the first layer for every norm, at up to as many passes as
    there are norms. A norm that is called several times in a forward pass depends on its own statistics; it is measured
    again, in up to 40 passes, until they come to rest, or ``result.notes`` name it. All others are exact either way.

    ``order="parallel"`` measures all norms in one training-like pass, in which they normalize by each batch's own mean
    and variance (biased, divisor m): exact for the first norm, but deeper ones meet in eval mode something else, the
    more so the smaller the batches. It keeps no batch. One with a single value per channel is normalized by the moments
    met so far (by the stored statistics, if it is the very first).

    Everything but the measured norms is in eval mode: Dropout is off.

    **How sure it is.** Standard errors come from the spread between batches (see
    :class:`batchnorm.statistics.spread.Spread`): ``result.layers[i].uncertainty``, ``result.least_certain()``. With a
    ``tolerance`` the stream is left as soon as no layer's uncertainty (the standard error of the mean in standard
    deviations, or of the variance relative to itself; root mean square over the channels) is larger.

    **Several processes.** With a ``process_group`` each process feeds its part of the stream, of any length, none
    included; what they met is merged, and all end with the same bits. If one fails, all raise, and none is changed.
    Before they work they compare what they are about to do: arguments, modules, the norms that are measured, the bits
    of the parameters and of the buffers that are not measured. What differs is an error in all. Only inside a
    ``DistributedDataParallel`` that broadcasts its buffers, where rank 0's count, those that differ become rank 0's.

    **What is left alone.** Norms that keep no statistics, that the pass never calls (or only in threads that the model
    starts itself, where they are not seen) and, unless ``names`` means them, those that the user froze: by ``freeze``,
    or by hand (in eval mode inside a model in train mode). They run on their stored statistics and are listed in the
    result. Parameters, modes, other buffers and torch's random generators are
    as before. The buffers are written at the very end, all or none: after any exception, an interrupt included, the
    model is bit-identical to before.

    Args:
        model: any model that holds batch norms: torch's, this library's, subclasses of either, scripted ones, or
            functional batch norm on buffers that some module of the model registered.
        batches: an iterable of tensors; of tuples or lists with the inputs first; or of dicts of keyword inputs. They
            must be on the model's device.
        order: ``"sequential"`` or ``"parallel"``.
        estimator: ``"pooled"`` or ``"within"``.
        names: which norms: None for all that are not frozen, else names, names of modules that hold norms, or
            patterns (``"*.bn2"``). A functional norm is called by its buffers' name without ``running_mean``.
        forward: how the model is called on a batch, where the above does not fit: ``forward(model, batch)``. It runs
            without autograd; in the sequential order, in another thread.
        tolerance: stop once every layer is as certain as this; 0.01 takes about 10⁴ independent values.
        memory: how many bytes the waiting batches may take, or a text such as ``"4GB"``; None for half of what is free.
        cache: a folder to put them in beyond that.
        process_group: the processes that measure together, such as ``torch.distributed.group.WORLD``; None for this one
            alone, with a warning where torch.distributed runs several.
        progress: show a progress bar on standard error; None shows it where that is a terminal.

    Returns:
        The statistics of each layer before and after, and ``undo()``.

    Raises:
        ArgumentTypeError: ``batches`` is a single batch, or a batch is of a type that needs ``forward``.
        BatchError: the loader or the model failed; the message says at which batch, the cause is chained. Or another
            process failed or was killed, or the disk is full.
        EmptyStreamError: there was no batch.
        NonFiniteError: a norm met NaN or infinity, or a variance does not fit into a half-precision buffer.
        ShapeError: a norm met fewer than two values per channel in the whole stream.
        StateError: the model holds nothing to recalibrate, or another call is at work on it; or the stream does not fit
            into memory and gives other data when it is walked through again; or gives every batch in the same memory;
            or the model gives another result on the same batch; or the processes differ in what they measure.
        UnknownNameError: a name means no norm, or the order or the estimator is unknown.

    Example:
        >>> import torch
        >>> from batchnorm.statistics import recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.ReLU())
        >>> result = recalibrate(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([3.]), tensor([7.]))
        >>> result.undo()
        >>> model[0].running_mean, model[0].running_var
        (tensor([0.]), tensor([1.]))

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2, for ``"within"``; Wu & Johnson 2021, arXiv 2105.07576,
    section 3, for the pooled estimate and the number of samples; Chan, Golub & LeVeque 1979 for the sums.
    """
    ranks = ranks_of(process_group)
    with ranks.failing_together():  # from here on: whatever one process refuses, the others must not wait for
        require_module("recalibrate", model)
        claim(model)
        plan = replace(plan_of(order, estimator, tolerance), processes=ranks.size)
        require_stream("recalibrate", batches)
        limit = limit_of(memory, model)
        sites = Sites(model, names, may_be_none=True)
        borrowed = agree(ranks, model, sites, _compared(plan, memory, limit, cache))
        sites.require_some()
        call = call_on_batch if forward is None else forward
        total = length_of(batches) if order == "parallel" else len(sites.known)
        with (
            untouched(model),
            unsynchronized(model),
            overlooked(model, "statistics"),
            progress_bar("Recalibrating", total, progress) as advance,
        ):
            borrowed.write()
            set_eval(model)
            chosen = ESTIMATORS[estimator]
            if order == "parallel":
                outcome = measure_in_parallel(model, call, batches, sites, chosen, ranks, tolerance, advance)
            else:
                measuring = Sequential(model, call, sites, chosen, ranks, limit=limit, cache=cache)
                outcome = measuring.measure(batches, tolerance, advance)
        return finish(plan, sites, outcome, ranks, borrowed)


def plan_of(order: Any, estimator: Any, tolerance: Any) -> MeasurementPlan:
    """Return how a single process is to measure.

    Raises:
        ShapeError: the tolerance is not positive.
        UnknownNameError: the order or the estimator is unknown.
    """
    for what, given, known in (("order", order, ORDERS), ("estimator", estimator, list(ESTIMATORS))):
        if given not in known:  # lists, for what is asked for may be no key at all
            raise UnknownNameError(
                f"recalibrate: {what}={given!r}; expected one of {', '.join(map(repr, known))}"
                f"{closest(str(given), known) or '.'}"
            )
    if tolerance is not None and not tolerance > 0:
        raise ShapeError(
            f"recalibrate: tolerance={tolerance}: expected a positive number, such as 0.01, the standard error in "
            "standard deviations that will do."
        )
    return MeasurementPlan(order, estimator, tolerance, 1)


def _compared(plan: MeasurementPlan, memory: Any, limit: float, cache: Any) -> dict[str, Any]:
    """Return the arguments that must be the same in all processes; the folder of a cache is each one's own."""
    about = {"order": plan.order, "estimator": plan.estimator, "tolerance": plan.tolerance}
    return {**about, "memory": None if memory is None else limit, "cache": None if cache is None else "a folder"}
