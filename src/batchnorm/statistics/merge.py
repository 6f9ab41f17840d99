"""Several models of one architecture made one: weights averaged, running statistics merged as a mixture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentTypeError, NonFiniteError, ShapeError, StateError
from batchnorm.files.tensor_memory import repeats
from batchnorm.models.copying import copy_model
from batchnorm.models.transaction import transaction
from batchnorm.moments import Moments
from batchnorm.nn.provenance import with_provenance
from batchnorm.statistics.buffers import write_all
from batchnorm.statistics.merge_result import MergedStatistics, MergeResult
from batchnorm.statistics.merge_sources import (
    Entry,
    Source,
    StatisticsPair,
    counts_of_averages,
    entries_of,
    source_of,
    statistics_of,
)

__all__ = ["merge"]


@transaction("merge", lambda models: _modules_of(models))
@with_provenance("merge")
def merge(
    models: Iterable[Module | Mapping[str, Tensor]],
    weights: Iterable[float] | None = None,
    *,
    model: Module | None = None,
) -> MergeResult:
    r"""Average several models of one architecture into a new one, with the statistics of their mixture.

    With the weights :math:`w_k` divided by their sum, each parameter and each other floating-point buffer becomes
    :math:`\sum_k w_k p_k`, and the running statistics of each norm, per channel,

    .. math::

        \mathrm{running\_mean} = \sum_k w_k \mu_k \qquad
        \mathrm{running\_var} = \sum_k w_k \sigma_k^2 + \sum_k w_k (\mu_k - \mathrm{running\_mean})^2

    with :math:`\mu_k` and :math:`\sigma_k^2` the running mean and variance of model k: the moments of the mixture in
    which an activation comes from model k with probability :math:`w_k`. The second term, the variance *between* the
    models, is what an average of the variances leaves out. Everything is added up in float64 and cast back.

    **Divisors.** Each :math:`\sigma_k^2` is unbiased (divisor :math:`n_k - 1`, as PyTorch keeps it), an estimate of the
    variance of a population; so is the result. No divisor is needed between the models, for the weights are those of
    populations. Where they are the numbers of values :math:`n_k`, of which each model holds the exact moments, the
    unbiased variance :math:`s^2` of all :math:`n = \sum_k n_k` values together (divisor n − 1) is met up to

    .. math::

        n\,\mathrm{running\_var} = (n - 1)\, s^2 + \sum_k \sigma_k^2

    **What it is not.** Merged statistics describe what the norms of the *given* models meet. A network with averaged
    weights computes other activations, and the further the models are apart, the less these statistics fit it. Where
    data is at hand, :func:`batchnorm.recalibrate` the result; how far apart the models are stands in it, norm by norm.

    **Counters, and the rest.** ``num_batches_tracked`` becomes the largest: models that share a past would count it
    several times in a sum, which over rounds of federated averaging grows without bound; so does ``n_averaged`` of an
    ``AveragedModel``. Other integer and boolean
    tensors have no average and must agree. Floating-point buffers that are the same in every model are kept as they
    are (a mask may hold −∞). A model with weight 0 has no part in any of this, whatever values it holds.

    Args:
        models: modules; or state dicts, such as federated clients send, together with ``model``. None is changed. Names
            of a wrapped model (``"module."`` of DistributedDataParallel) are read without the prefix.
        weights: one number ≥ 0 a model, such as its number of samples; None weighs all alike.
        model: a model of the architecture that becomes the merged one (a copy of it does); None takes the first of
            ``models``. Its mode, its hooks, tied parameters and what is no tensor are kept, its values are not.

    Returns:
        The merged model in ``.model``, and for each norm how far apart the models are.

    Raises:
        ArgumentTypeError: something is neither a module nor a state dict, or a weight is no number.
        InputError: tensors of one name differ in shape or dtype.
        NonFiniteError: a model with a weight holds NaN or infinity, or a merged variance does not fit its dtype.
        ShapeError: a weight is negative, infinite or NaN, all are 0, or there are not as many as models.
        StateError: norms differ in ``eps`` or ``momentum``, integers disagree, a variance is negative, parameters that
            are tied in the merged model have several values, a tensor has no value yet, or there is no model.
        UnknownNameError: a model lacks a tensor, or has one that the others do not have.

    Example:
        >>> import torch
        >>> from batchnorm.statistics import merge
        >>> one, other = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
        >>> _ = one.running_mean.fill_(-2), other.running_mean.fill_(6)
        >>> result = merge([one, other], weights=[300, 100])
        >>> result.model.running_mean, result.model.running_var  # of the variance 13, 12 are between the two
        (tensor([0.]), tensor([13.]))

    Source: Chan, Golub & LeVeque 1979, eq. 2.1, for the moments of a union; McMahan et al. 2017, arXiv 1602.05629,
    Algorithm 1, and Wortsman et al. 2022, arXiv 2203.05482, section 2, for averages of weights; Izmailov et al. 2018,
    arXiv 1803.05407, section 3.2, for why the statistics are then to be measured anew.
    """
    given = _listed(models)
    base = _base(given, model)
    shares = _shares(weights, len(given))
    entries = entries_of(base)
    pairs = statistics_of(base)
    sources = [source_of(f"models[{k}]", item, base, entries) for k, item in enumerate(given)]
    active = [(source, share) for source, share in zip(sources, shares, strict=True) if share > 0]
    parts, w = [source for source, _ in active], [share for _, share in active]
    in_pairs = {name for pair in pairs for name in (pair.mean, pair.variance)}
    counters = {pair.counter for pair in pairs} | counts_of_averages(base)
    new = {e.name: _combined(e, parts, w, e.name in counters) for e in entries if e.name not in in_pairs}
    layers = []
    for pair in pairs:
        layer, values = _mixture(pair, parts, w)
        layers.append(layer)
        new |= values
    merged = copy_model("merge", base, "Pass model= a model of the same architecture that can be copied.")
    _write(merged, new)
    return MergeResult(merged, shares, layers, averaged=sum(e.floating and e.name not in in_pairs for e in entries))


# -- what was given --------------------------------------------------------------------------------------------------


def _modules_of(models: Any) -> Iterator[Module]:
    """Yield the modules of the models, without walking through an iterator that can be walked once."""
    for model in models if isinstance(models, list | tuple) else ():
        if isinstance(model, Module):
            yield from model.modules()


def _listed(models: Iterable[Module | Mapping[str, Tensor]]) -> list[Module | Mapping[str, Tensor]]:
    # a Sequential can be walked through too, layer by layer
    if isinstance(models, Module | Mapping | str | bytes | Tensor) or not isinstance(models, Iterable):
        raise ArgumentTypeError(
            f"merge: expected several models or state dicts; got one {type(models).__name__}. Put them into a list."
        )
    given = list(models)
    if not given:
        raise StateError("merge: there is no model to merge. Pass at least one.")
    for k, item in enumerate(given):
        if not isinstance(item, Module | Mapping):
            raise ArgumentTypeError(
                f"merge: models[{k}]: expected a module or a state dict; got {type(item).__name__}."
            )
    return given


def _base(given: Sequence[Module | Mapping[str, Tensor]], model: Module | None) -> Module:
    base = given[0] if model is None else model
    if isinstance(base, Module):
        return base
    if model is not None:
        raise ArgumentTypeError(f"merge: model: expected a torch.nn.Module; got {type(model).__name__}.")
    raise ArgumentTypeError(
        "merge: models[0] is a state dict, which does not say which of its tensors are running statistics. Pass a "
        "model of the architecture too: merge(state_dicts, weights, model=model)."
    )


def _shares(weights: Iterable[float] | None, number: int) -> list[float]:
    """Return the weights divided by their sum."""
    if weights is None:
        return [1 / number] * number
    try:
        found = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"merge: weights: expected numbers, one a model; got {weights!r}.") from error
    if len(found) != number:
        raise ShapeError(f"merge: weights: expected {number}, one a model; got {len(found)}.")
    for k, weight in enumerate(found):
        if not (math.isfinite(weight) and weight >= 0):
            raise ShapeError(f"merge: weights[{k}] is {weight:g}; expected a finite number, 0 or more.")
    largest = max(found)
    if largest == 0:
        raise ShapeError("merge: weights: all are 0, so no model has a part. Give at least one a positive weight.")
    scaled = [weight / largest for weight in found]  # their sum cannot overflow
    total = math.fsum(scaled)
    return [weight / total for weight in scaled]


# -- what becomes of it ----------------------------------------------------------------------------------------------


def _combined(entry: Entry, sources: Sequence[Source], shares: Sequence[float], counter: bool) -> Tensor:
    """Return the merged value of a tensor that is no running statistic."""
    values = [source.values[entry.name] for source in sources]
    if entry.is_buffer and all(torch.equal(values[0], value) for value in values[1:]):
        return values[0]
    if entry.floating:
        for source in sources:
            source.require_finite(entry.name)
        return _average(values, shares).to(entry.dtype)
    if counter:
        return torch.stack(values).amax(0)
    odd = next((s for s, value in zip(sources, values, strict=True) if not torch.equal(values[0], value)), None)
    if odd is not None:
        raise StateError(
            f"merge: {entry.name} ({str(entry.dtype).removeprefix('torch.')}) differs between {sources[0].label} and "
            f"{odd.label}, and integers have no average. Copy the one that is meant into every model first."
        )
    return values[0]


def _average(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the weighted mean in double precision; that of equal values is their value, exactly."""
    first = _double(values[0])
    total = first
    for value, share in zip(values[1:], shares[1:], strict=True):
        total = total + share * (_double(value) - first)
    return total


def _mixture(
    pair: StatisticsPair, sources: Sequence[Source], shares: Sequence[float]
) -> tuple[MergedStatistics, dict[str, Tensor]]:
    """Return the statistics of the mixture: what is said of them, and the new values of the two buffers."""
    for source in sources:
        source.require_finite(pair.mean)
        source.require_variance(pair.variance)
    dtype = sources[0].values[pair.mean].dtype
    shape = sources[0].values[pair.mean].shape
    means = [_double(source.values[pair.mean]).reshape(-1) for source in sources]
    variances = [_double(source.values[pair.variance]).reshape(-1) for source in sources]
    # as counts, of which Moments takes none below 1
    counts = [share / min(shares) for share in shares]
    total = reduce(
        Moments.merge,
        (
            Moments(torch.full_like(mean, count), mean, variance * count)
            for count, mean, variance in zip(counts, means, variances, strict=True)
        ),
    )
    mean, variance = total.mean, total.variance()
    new = {pair.mean: mean.to(dtype).view(shape), pair.variance: variance.to(dtype).view(shape)}
    if not bool(torch.isfinite(new[pair.variance]).all()):
        raise NonFiniteError(
            f"merge: {pair.variance} reaches {float(variance.max()):.4g}, more than {dtype} can hold. Merge the models "
            "in float32 (model.float())."
        )
    stacked = torch.stack(means)
    layer = MergedStatistics(
        name=pair.name,
        eps=pair.eps,
        mean=mean,
        variance=variance,
        within=_average(variances, shares),
        between=_average([(each - mean).square() for each in means], shares),
        widest=stacked.amax(0) - stacked.amin(0),
    )
    return layer, new


def _double(value: Tensor) -> Tensor:
    value = value.detach()
    if value.device.type == "mps":  # it has no float64
        value = value.cpu()
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _write(merged: Module, new: Mapping[str, Tensor]) -> None:
    # the values of an expanded buffer's channels differ now: it gets memory for each
    dense: dict[int, Tensor] = {}
    for module in merged.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not is_lazy(buffer) and repeats(buffer):
                own_memory = buffer.clone(memory_format=torch.contiguous_format)
                module._buffers[name] = dense.setdefault(id(buffer), own_memory)
    own = {entry.name: entry.tensor for entry in entries_of(merged)}
    write_all([(own[name], value) for name, value in new.items()])
