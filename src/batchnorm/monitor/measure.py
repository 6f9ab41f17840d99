"""What passes by any modules of a model, as a population to compare with: for models whose norms have been folded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, Module

from batchnorm.errors import StateError, UnknownNameError, closest
from batchnorm.moments import Moments
from batchnorm.nn.calling import call_on_batch, compiled_modules_eager
from batchnorm.nn.require import require_module
from batchnorm.nn.select import NormModule, listed
from batchnorm.statistics.population import LayerPopulation, Population
from batchnorm.statistics.spread import Spread

__all__ = ["INPUT_OF", "measure"]

INPUT_OF = "@input"
"""Ends the names of what :func:`measure` measured, so that it is not taken for what a norm of that name met."""


def measure(model: Module, batches: Iterable[Any], names: str | Sequence[str] | None = None) -> Population:
    r"""Return the moments of what the modules of these names are given on batches known to be good.

    .. math:: n, \quad \mathrm{mean} = \tfrac1n \sum x, \quad M_2 = \sum (x - \mathrm{mean})^2

    per channel over all samples and positions, with the standard errors of mean and variance from batch to batch. A
    folded model has no norms any more, but an identity in the place of each: what passes there is measured on the model
    as it is deployed, and compared there.

    Args:
        model: any model; it is run as it is, without gradients, and not changed.
        batches: as for :func:`batchnorm.recalibrate`.
        names: of modules; None for every norm, and every ``torch.nn.Identity``.

    Returns:
        A population for ``batchnorm.watch(model, reference=...)``; it can be kept with ``save``.

    Raises:
        UnknownNameError: the model has no module of that name.
        StateError: none of them was given a tensor (N, C, ...), or there was only one batch.

    Example:
        >>> import torch, batchnorm
        >>> from batchnorm.monitor import measure
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()).eval()
        >>> deployed = batchnorm.fold(net, torch.randn(2, 3)).model
        >>> g = torch.Generator().manual_seed(0)
        >>> reference = measure(deployed, [torch.randn(64, 3, generator=g) for _ in range(8)])
        >>> with torch.no_grad(), batchnorm.watch(deployed, reference=reference) as watching:
        ...     _ = deployed(torch.randn(64, 3, generator=g) + 2)
        >>> watching.result().drifted
        True
    """
    require_module("measure", model)
    places = _places(model, names)
    spreads: dict[str, Spread] = {name: Spread() for name in places}
    number = 0

    def hook(name: str) -> Callable[[Module, tuple[Any, ...]], None]:
        def take(module: Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.numel():
                spreads[name].add(Moments.of(x), number)

        return take

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in places.items()]
    try:
        with compiled_modules_eager, torch.no_grad():
            for number, batch in enumerate(batches):  # noqa: B007  the hooks read it
                call_on_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {f"{name}{INPUT_OF}": _layer(spread, number + 1) for name, spread in spreads.items() if spread.groups}
    if not found:
        raise StateError(
            f"measure: no place of {type(model).__name__} was given a tensor (N, C, ...) on these batches. Pass names= "
            "of modules that are."
        )
    if number == 0:
        raise StateError("measure: expected two batches or more, to tell how sure the moments are; got one.")
    return Population(found)


def _places(model: Module, names: str | Sequence[str] | None) -> dict[str, Module]:
    modules = dict(model.named_modules())
    if names is None:
        return {name: m for name, m in modules.items() if isinstance(m, Identity | NormModule)}
    for name in listed(names):
        if name not in modules:
            raise UnknownNameError(
                f"measure: {name!r}: no module of that name in {type(model).__name__}{closest(name, modules) or '.'}"
            )
    return {name: modules[name] for name in listed(names)}


def _layer(spread: Spread, batches: int) -> LayerPopulation:
    return LayerPopulation(reduce(Moments.merge, spread.groups), *spread.standard_errors(), batches)
