"""Population statistics in one pass over data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from batchnorm.errors import (
    ArgumentTypeError,
    BatchError,
    NonFiniteError,
    ShapeError,
    StateError,
    UnknownNameError,
    closest,
)
from batchnorm.nn.calling import Forward, call_on_batch
from batchnorm.nn.require import require_module
from batchnorm.nn.snapshot import untouched
from batchnorm.report.progress import progress_bar
from batchnorm.statistics.buffers import write_all
from batchnorm.statistics.collect import Collector, OnBatch, Tally
from batchnorm.statistics.estimators import ESTIMATORS, Within
from batchnorm.statistics.result import LayerStatistics, RecalibrateResult, Written
from batchnorm.statistics.sites import Left, Site, Sites
from batchnorm.statistics.stream import in_one_line, length_of, numbered, require_stream

__all__ = ["recalibrate"]


def recalibrate(
    model: Module,
    batches: Iterable[Any],
    *,
    estimator: Literal["pooled", "within"] = "pooled",
    names: str | Sequence[str] | None = None,
    forward: Forward | None = None,
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

    **What is exact.** During the pass the measured norms run on batch statistics, as in training, and everything else
    in eval mode (Dropout is off). What the first norm meets does not depend on norms, so its statistics are exact
    whatever the batch size. A deeper norm meets what the norms before it made of each batch, as in training: its
    statistics are the exact moments of that, but they depend on the batch size, and differ from what it will meet in
    eval mode, less so the larger the batches. Use batches as large as those of training, or larger, and about 10³–10⁴
    samples. A batch with a single value per channel counts in the pooled moments as the one value it is; having no
    variance, it is normalized by the moments met so far (by the stored statistics, if it is the very first).

    **What is left alone.** Norms that keep no statistics, that the pass never calls and, unless ``names`` means them,
    those that the user froze: by ``freeze``, or by hand (in eval mode inside a model in train mode). They run on their
    stored statistics and are listed in the result. Parameters, modes, other buffers and torch's random generators are
    as before. The buffers are written at the very end, all or none: after any exception, an interrupt included, the
    model is bit-identical to before.

    Args:
        model: any model that holds batch norms: torch's, this library's, subclasses of either, scripted ones, or
            functional batch norm on buffers that some module of the model registered.
        batches: an iterable of tensors; of tuples or lists with the inputs first; or of dicts of keyword inputs. They
            must be on the model's device.
        estimator: ``"pooled"`` or ``"within"``.
        names: which norms: None for all that are not frozen, else names, names of modules that hold norms, or
            patterns (``"*.bn2"``). A functional norm is called by its buffers' name without ``running_mean``.
        forward: how the model is called on a batch, where the above does not fit: ``forward(model, batch)``. It runs
            without autograd.
        progress: show a progress bar on standard error; None shows it where that is a terminal.

    Returns:
        The statistics of each layer before and after, and ``undo()``.

    Raises:
        ArgumentTypeError: ``batches`` is a single batch, or a batch is of a type that needs ``forward``.
        BatchError: the loader or the model failed; the message says at which batch, the cause is chained.
        EmptyStreamError: there was no batch.
        NonFiniteError: a norm met NaN or infinity, or a variance does not fit into a half-precision buffer.
        ShapeError: a norm met fewer than two values per channel in the whole stream.
        StateError: the model holds nothing to recalibrate.
        UnknownNameError: a name means no norm, or the estimator is unknown.

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
    require_module("recalibrate", model)
    if estimator not in list(ESTIMATORS):  # a list, for what is asked for may be no key at all
        raise UnknownNameError(
            f"recalibrate: estimator={estimator!r}; expected one of {', '.join(map(repr, ESTIMATORS))}"
            f"{closest(str(estimator), ESTIMATORS) or '.'}"
        )
    require_stream("recalibrate", batches)
    sites = Sites(model, names)
    collector = OnBatch(sites, ESTIMATORS[estimator])
    call = call_on_batch if forward is None else forward
    with untouched(model), progress_bar("Recalibrating", length_of(batches), progress) as advance:
        _set_eval(model)
        number = _collect(model, batches, call, collector, advance)
    return _finish(estimator, number, sites, collector.tallies)


def _set_eval(model: Module) -> None:
    """Put every module into eval mode by its attribute: ``eval()`` may be overridden to do more than that."""
    for module in model.modules():
        if getattr(module, "training", False):
            module.training = False


def _collect(model: Module, batches: Iterable[Any], call: Forward, collector: Collector, advance: Any) -> int:
    """Run the model on every batch and return how many there were."""
    number = 0
    for index, batch in numbered("recalibrate", batches):
        try:
            collector.run(index, partial(call, model, batch))
        except NonFiniteError as error:
            raise NonFiniteError(f"recalibrate: batch {index} (counting from 0): {error}. {_origin(batch)}") from error
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"recalibrate: batch {index} (counting from 0): {error}") from error
        except Exception as error:
            # most likely a batch that the model is not called on in the usual way
            hint = f"{_CALLED} " if isinstance(error, TypeError) and call is call_on_batch else ""
            raise BatchError(
                f"recalibrate: {type(model).__name__} failed on batch {index} (counting from 0): {in_one_line(error)} "
                f"{hint}The model is as it was."
            ) from error
        number = index + 1
        advance()
    return number


_CALLED = (
    "Of a tuple the first element is the input, of a dict every entry; forward=lambda model, batch: ... calls the "
    "model in another way."
)


def _origin(batch: Any) -> str:
    """Say whether values that are not finite came with the batch or were made on the way."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.is_floating_point()]
    if any(not bool(torch.isfinite(t).all()) for t in tensors):
        return "The batch itself holds such values: remove them from the data. The model is as it was."
    return "The batch is finite, so a layer before this one made them. The model is as it was."


def _finish(estimator: str, number: int, sites: Sites, tallies: dict[Site, Tally]) -> RecalibrateResult:
    """Write what was measured into the buffers, and report it."""
    left = list(sites.left.values())
    left += [Left(site.name, "never called during the pass") for site in sites.known if site not in tallies]
    if sites.unknown_calls:
        left.append(Left("(functional)", "its running statistics are not buffers of the model"))
    if not tallies and not sites.known and not sites.left:
        raise StateError(
            "recalibrate: the model called no batch norm with running statistics, so there is nothing to recalibrate."
        )
    layers: list[LayerStatistics] = []
    changes: list[tuple[Tensor, Tensor]] = []
    written: list[Written] = []
    for site, tally in tallies.items():
        new = _new_values(site, tally)
        old = {key: getattr(site.owner, key).detach().clone() for key in new}
        changes += [(getattr(site.owner, key), value) for key, value in new.items()]
        written += [Written(f"{site.name}.{key}".lstrip("."), site.owner, key, value) for key, value in old.items()]
        layers.append(_layer(site, tally, old, new))
    write_all(changes)
    return RecalibrateResult(estimator, number, layers, left, written)


def _new_values(site: Site, tally: Tally) -> dict[str, Tensor]:
    """Return what the buffers of a site are to hold, by their key, in their own dtype.

    Raises:
        ShapeError: some channel met too few values.
        NonFiniteError: a value does not fit into the buffer's dtype.
    """
    mean, variance = tally.estimator.statistics()
    name = site.name or "the norm"
    missing = variance.isnan().nonzero().flatten().tolist()
    if missing:
        met = int(tally.estimator.pooled.count[missing[0]])
        scope = "in some batch" if isinstance(tally.estimator, Within) else "in all"
        raise ShapeError(
            f"recalibrate: {name}: a variance needs at least 2 values per channel {scope}; channel {missing[0]} met "
            f"{met} in {tally.calls} calls. Pass larger or more batches. The model is as it was."
        )
    mean_key, variance_key, batches_key = site.keys
    new = {}
    for key, value, buffer in ((mean_key, mean, site.running_mean), (variance_key, variance, site.running_var)):
        new[key] = value.to(buffer.dtype).view_as(buffer)
        if not bool(torch.isfinite(new[key]).all()):
            raise NonFiniteError(
                f"recalibrate: {name}: {key} reaches {float(value.abs().max()):.4g}, more than {buffer.dtype} can "
                "hold. Keep the norm in float32 (norm.float()). The model is as it was."
            )
    if batches_key is not None:
        counter: Tensor = getattr(site.owner, batches_key)
        new[batches_key] = torch.full_like(counter, tally.batches)
    return new


def _layer(site: Site, tally: Tally, old: dict[str, Tensor], new: dict[str, Tensor]) -> LayerStatistics:
    mean, variance, _ = site.keys
    return LayerStatistics(
        name=site.name,
        batches=tally.batches,
        calls=tally.calls,
        values=int(tally.estimator.pooled.count.min()),
        single_calls=tally.single_calls,
        eps=tally.eps,
        mean_before=old[mean],
        variance_before=old[variance],
        mean_after=new[mean],
        variance_after=new[variance],
    )
