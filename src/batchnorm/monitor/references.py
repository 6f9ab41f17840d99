"""What a watch compares with: the statistics stored in a model's norms, or a population kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from batchnorm.errors import NonFiniteError, ShapeError, StateError
from batchnorm.models.float64 import float64_device
from batchnorm.monitor.measure import INPUT_OF
from batchnorm.monitor.stream import ReferenceStatistics
from batchnorm.nn.select import NormModule
from batchnorm.statistics.population import LayerPopulation, Population

__all__ = ["Comparable", "from_buffers", "from_population", "keeps_statistics"]


@dataclass
class Comparable:
    """What can be compared.

    Attributes:
        references: by name.
        places: modules that are no norms and are watched all the same, by name.
        refused: what cannot be compared, by name, with the reason as a sentence.
    """

    references: dict[str, ReferenceStatistics] = field(default_factory=dict)
    places: dict[str, Module] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def keeps_statistics(norm: NormModule) -> bool:
    """Return whether a norm has stored statistics with values in them."""
    return norm.running_mean is not None and norm.running_var is not None and not is_lazy(norm.running_mean)


def from_buffers(norms: Mapping[str, NormModule]) -> Comparable:
    """Return the statistics that norms have stored, as they are now."""
    found = Comparable()
    for name, norm in norms.items():
        if keeps_statistics(norm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            found.references[name] = ReferenceStatistics.of(norm.running_mean, norm.running_var, norm.eps)
    return found


def from_population(model: Module, norms: Mapping[str, NormModule], population: Population) -> Comparable:
    """Return what of a population can be compared with what the model of that name meets.

    Args:
        model: which is watched.
        norms: those of its norms that are, by name; others of the population are passed over.
        population: what was measured.

    Raises:
        NonFiniteError: it holds NaN or infinity.
        StateError: nothing can be, or it was measured on the model with norms and this is the folded one, or the other
            way round.
        ShapeError: a norm has another number of channels, or fewer than two values were met.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = Comparable()
    for key, layer in population.layers.items():
        known = key.removesuffix(INPUT_OF)
        name = next((n for n in (known, f"module.{known}", f"_orig_mod.{known}") if n in modules), None)
        if name is None:
            found.refused[known] = f"the model has no module {known}."
            continue
        is_norm = isinstance(modules[name], NormModule)
        if is_norm and name not in norms:
            continue
        _require_same_form(model, name, modules[name], layer, of_input=key.endswith(INPUT_OF))
        if not is_norm and not key.endswith(INPUT_OF):
            found.refused[known] = _no_norm(name, modules[name])
            continue
        if is_norm:
            norm = norms[name]
            if norm.num_features != layer.moments.num_features:
                raise ShapeError(
                    f"watch: reference: {name}: expected statistics of {norm.num_features} channels, those of the "
                    f"norm; got {layer.moments.num_features}. Pass the population of this model."
                )
            found.references[name] = _reference(name, layer, norm.eps, _device_of(norm))
        else:
            found.places[name] = modules[name]
            found.references[name] = _reference(name, layer, 0.0, _device_of(model))
    if not found.references:
        first = next(iter(found.refused.values()), "it is empty.")
        raise StateError(
            f"watch: nothing of the reference can be compared with {type(model).__name__}: {first} Pass a population "
            "that was measured on this model."
        )
    return found


def _require_same_form(model: Module, name: str, module: Module, layer: LayerPopulation, *, of_input: bool) -> None:
    """Refuse what was measured with norms for the model without them, and the other way round.

    In the place of a folded norm stands an identity, which is given what the norm would have returned; and what passes
    elsewhere may have another scale, too.

    Raises:
        StateError: a norm stood where none stands now, or none where one does.
    """
    is_norm = isinstance(module, NormModule)
    if layer.of_norm and not is_norm:
        problem = _no_norm(name, module)
    elif layer.of_norm is False and of_input and is_norm:
        problem = (
            f"{name} is a norm in this model ({type(module).__name__}) and was none where the reference was measured, "
            f"so that what passed there is not what the norm is given. Measure on the model as it is deployed: "
            f"{_REMEDY}"
        )
    else:
        return
    raise StateError(f"watch: the reference is not one of {type(model).__name__} as it is now: {problem}")


def _no_norm(name: str, module: Module) -> str:
    return (
        f"{name} is no norm in this model ({type(module).__name__}), so that what the norm was given does not pass "
        f"there. Of a folded model measure what does, on the model as it is deployed: {_REMEDY}"
    )


_REMEDY = "batchnorm.monitor.measure(model, batches)."


def _reference(name: str, layer: LayerPopulation, eps: float, device: torch.device) -> ReferenceStatistics:
    _require_statistics(name, layer)
    home = float64_device(device)
    finite = bool(torch.isfinite(layer.mean_error).all() and torch.isfinite(layer.variance_error).all())

    def there(t: Tensor) -> Tensor:
        return t.detach().to(home, torch.float64)

    return ReferenceStatistics(
        there(layer.moments.mean),
        there(layer.moments.variance(correction=1)),
        eps,
        there(layer.mean_error) if finite else None,
        there(layer.variance_error) if finite else None,
    )


def _device_of(module: Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def _require_statistics(name: str, layer: LayerPopulation) -> None:
    """Refuse moments that nothing can be compared with.

    Raises:
        NonFiniteError: some are NaN or infinite.
        ShapeError: a channel met fewer than two values.
    """
    moments, where = layer.moments, f"watch: reference: {name or 'the model'}"
    bad = (~moments.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(
            f"{where} holds NaN or infinity in {len(bad)} of its {moments.num_features} channels (first {bad[0]}), and "
            "nothing can be compared with that. Measure it anew, on data without such values."
        )
    few = (moments.count < 2).nonzero().flatten().tolist()
    if few:
        raise ShapeError(
            f"{where}: expected two values or more per channel; channel {few[0]} met {int(moments.count[few[0]])}. "
            "Measure it on more data."
        )
