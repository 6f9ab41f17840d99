"""What passes by any modules of a model, as a population to compare with: for models whose norms have been folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, Module

from batchnorm.errors import NonFiniteError, StateError, UnknownNameError, closest
from batchnorm.functional.measure import moments_of
from batchnorm.models.calling import Forward, call_on_batch, compiled_modules_eager
from batchnorm.models.preconditions import lazy_names, require_module
from batchnorm.models.snapshot import set_eval, untouched
from batchnorm.models.transaction import on_failure, transaction
from batchnorm.models.unsynchronized import unsynchronized
from batchnorm.moments import Moments
from batchnorm.nn.redirect import overlooked
from batchnorm.nn.select import NormModule, listed
from batchnorm.statistics.collect import require_finite
from batchnorm.statistics.failures import explained
from batchnorm.statistics.population import LayerPopulation, Population
from batchnorm.statistics.spread import Spread
from batchnorm.statistics.stream import numbered, require_stream
from batchnorm.statistics.values import too_few

__all__ = ["INPUT_OF", "measure"]

INPUT_OF = "@input"
"""Ends the names of what :func:`measure` measured, so that it is not taken for what a norm of that name met."""


@transaction("measure")
def measure(
    model: Module,
    batches: Iterable[Any],
    names: str | Sequence[str] | None = None,
    *,
    forward: Forward | None = None,
) -> Population:
    r"""Return the moments of what the modules of these names are given on batches known to be good.

    .. math:: n, \quad \mathrm{mean} = \tfrac1n \sum x, \quad M_2 = \sum (x - \mathrm{mean})^2

    per channel over all samples and positions, with the standard errors of mean and variance from batch to batch. A
    folded model has no norms any more, but an identity in the place of each: what passes there is measured on the model
    as it is deployed, and compared there.

    The model runs in eval mode, whatever mode it is in: a reference is for a model at work, whose norms normalize by
    their running statistics and whose Dropout is off. It is as it was afterwards, also after an exception or an
    interrupt: modes, parameters, buffers, torch's random generators.

    Args:
        model: any model; it is run without gradients.
        batches: as for :func:`batchnorm.recalibrate`; two or more.
        names: of modules; None for every norm, and every ``torch.nn.Identity``.
        forward: how the model is called on a batch, as for :func:`batchnorm.recalibrate`.

    Returns:
        A population for ``batchnorm.watch(model, reference=...)``; it can be kept with ``save``.

    Raises:
        ArgumentTypeError: ``batches`` is a single batch, or a batch is of a type that needs ``forward``.
        BatchError: the loader or the model failed; the message says at which batch, the cause is chained.
        EmptyStreamError: there was no batch.
        NonFiniteError: a module was given NaN or infinity.
        ShapeError: no module was given a single value.
        StateError: none of them was given a tensor (N, C, ...), or there was only one batch; or another call is at
            work on the model.
        UnknownNameError: the model has no module of that name.

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
    require_stream("measure", batches)
    lazy = lazy_names(model)
    if lazy:
        raise StateError(f"measure: {lazy[0]} has no value yet. Run the model once on real inputs first.")
    meters = {name: _Meter(name, module) for name, module in _places(model, names).items()}
    call = call_on_batch if forward is None else forward
    with (
        untouched(model),
        unsynchronized(model),
        overlooked(model, "statistics"),
        compiled_modules_eager,
        torch.no_grad(),
        _attached(meters.values()),
    ):
        set_eval(model)
        for index, batch in numbered("measure", batches):
            try:
                call(model, batch)
                _raise_failure(meters.values())
            except Exception as error:
                failure = next((m.failure for m in meters.values() if m.failure), error)
                raise explained("measure", failure, model, index, batch, call) from error
            for meter in meters.values():
                meter.number = index + 1
    return Population({f"{m.name}{INPUT_OF}": m.layer() for m in _that_met_something(model, list(meters.values()))})


@dataclass
class _Meter:
    """What one module is given.

    Attributes:
        name: of the module.
        module: which one.
        number: index of the batch that runs.
        spread: the moments, and how far the batches are apart.
        called: whether it was given a tensor (N, C, ...), if only empty ones.
        batches: in how many batches it was given values.
        failure: what was raised here; a scripted module around it makes an error of its own of it.
    """

    name: str
    module: Module
    number: int = 0
    spread: Spread = field(default_factory=Spread)
    called: bool = False
    batches: set[int] = field(default_factory=set)
    failure: NonFiniteError | None = None

    def take(self, module: Module, args: tuple[Any, ...]) -> None:
        """Take in what the module is about to work on."""
        x = args[0] if args else None
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1):
            return
        self.called = True
        if x.numel() == 0:
            return
        met = moments_of(x, None)
        try:
            require_finite(self.name or "the model", met)
        except NonFiniteError as error:
            self.failure = error
            raise
        self.spread.add(met, self.number)
        self.batches.add(self.number)

    def layer(self) -> LayerPopulation:
        """Return what it was given."""
        moments = reduce(Moments.merge, self.spread.groups)
        return LayerPopulation(
            moments, *self.spread.standard_errors(), len(self.batches), isinstance(self.module, NormModule)
        )


def _raise_failure(meters: Iterable[_Meter]) -> None:
    """Raise what a meter raised and the model swallowed."""
    for meter in meters:
        if meter.failure is not None:
            raise meter.failure


@contextmanager
def _attached(meters: Iterable[_Meter]) -> Iterator[None]:
    """Let the meters see what their modules are given."""
    with ExitStack() as stack:
        on_failure(stack.close)  # an interrupt may come before the block ends by itself
        for meter in meters:
            stack.callback(meter.module.register_forward_pre_hook(meter.take).remove)
        yield


def _that_met_something(model: Module, meters: Sequence[_Meter]) -> list[_Meter]:
    """Return the meters of modules that were given values, in two batches or more.

    Raises:
        ShapeError: there is none, for all batches were empty.
        StateError: there is none for another reason.
    """
    met = [meter for meter in meters if meter.batches]
    called = next((meter for meter in meters if meter.called), None)
    if not met and called is not None:
        raise too_few("measure", f"{called.name or 'the model'}: a variance", "in all", channel=0, met=0, calls=0)
    if not met:
        raise StateError(
            f"measure: no place of {type(model).__name__} was given a tensor (N, C, ...) on these batches. Pass names= "
            "of modules that are."
        )
    if all(len(meter.batches) < 2 for meter in met):
        raise StateError("measure: expected two batches or more, to tell how sure the moments are; got one.")
    return met


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
