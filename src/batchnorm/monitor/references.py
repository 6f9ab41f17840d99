"""What a watch compares with: the statistics stored in a model's norms, or a population kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from batchnorm.errors import ShapeError, StateError
from batchnorm.graph.rounding import float64_device
from batchnorm.monitor.measure import INPUT_OF
from batchnorm.monitor.stream import Reference
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

    references: dict[str, Reference] = field(default_factory=dict)
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
            found.references[name] = Reference.of(norm.running_mean, norm.running_var, norm.eps)
    return found


def from_population(model: Module, norms: Mapping[str, NormModule], population: Population) -> Comparable:
    """Return what of a population can be compared with what the model of that name meets.

    Raises:
        StateError: nothing can be.
        ShapeError: a norm has another number of channels.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = Comparable()
    for key, layer in population.layers.items():
        known = key.removesuffix(INPUT_OF)
        name = next((n for n in (known, f"module.{known}", f"_orig_mod.{known}") if n in modules), None)
        if name is None:
            found.refused[known] = f"the model has no module {known}."
        elif key.endswith(INPUT_OF) and name not in norms:
            found.places[name] = modules[name]
            found.references[name] = _reference(layer, 0.0, _device_of(model))
        elif name in norms:
            norm = norms[name]
            if norm.num_features != layer.moments.num_features:
                raise ShapeError(
                    f"watch: reference: {name}: expected statistics of {norm.num_features} channels, those of the "
                    f"norm; got {layer.moments.num_features}. Pass the population of this model."
                )
            found.references[name] = _reference(layer, norm.eps, _device_of(norm))
        else:
            found.refused[known] = (
                f"{name} is no norm in this model ({type(modules[name]).__name__}), so that what the norm was given "
                "does not pass there. Of a folded model measure what does: batchnorm.monitor.measure(model, batches)."
            )
    if not found.references:
        first = next(iter(found.refused.values()), "it is empty.")
        raise StateError(
            f"watch: nothing of the reference can be compared with {type(model).__name__}: {first} Pass a population "
            "that was measured on this model."
        )
    return found


def _reference(layer: LayerPopulation, eps: float, device: torch.device) -> Reference:
    home = float64_device(device)
    finite = bool(torch.isfinite(layer.mean_error).all() and torch.isfinite(layer.variance_error).all())

    def there(t: Tensor) -> Tensor:
        return t.detach().to(home, torch.float64)

    return Reference(
        there(layer.moments.mean),
        there(layer.moments.variance(correction=1)),
        eps,
        there(layer.mean_error) if finite else None,
        there(layer.variance_error) if finite else None,
    )


def _device_of(module: Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))
