"""The parameters of a folded model, and how they and the norms' stand-ins are put into the model's own tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, Module, Parameter

from batchnorm.graph.affine import Affine
from batchnorm.graph.norms import NormState
from batchnorm.graph.refusal import Refusal
from batchnorm.graph.sites import Host, Site

__all__ = ["Merged", "Rewrite", "find_tensor", "merge", "norm_tensors"]


@dataclass(frozen=True, eq=False)
class Merged:
    """The weight and bias that let a host compute what it and the norm computed before."""

    host: Host
    weight: Parameter
    bias: Parameter


def find_tensor(model: Module, name: str | None) -> Tensor | None:
    """Return the parameter or buffer of that qualified name, None for no name or an empty place."""
    if name is None:
        return None
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    return module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]


def norm_tensors(model: Module, state: NormState) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return running mean, running variance, γ and β of a norm."""
    mean, var = find_tensor(model, state.running_mean), find_tensor(model, state.running_var)
    assert mean is not None
    assert var is not None
    return mean, var, find_tensor(model, state.weight), find_tensor(model, state.bias)


def merge(model: Module, site: Site) -> tuple[Merged, ...]:
    """Return the merged parameters of a site, computed in float64 and rounded once; the model is not changed.

    Raises:
        Refusal: the statistics are unusable, or a merged parameter does not fit into its dtype.
    """
    mean, var, weight, bias = norm_tensors(model, site.state)
    for name, tensor in (("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.is_meta:
            raise Refusal(f"Its {name} is on the meta device, where tensors have no values.")
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise Refusal(f"Its {name} is not finite.")
    lowest = float(var.double().min()) if var.numel() else 1.0
    if lowest < 0:
        raise Refusal(f"Its running_var is negative ({lowest:.3g}).")
    if lowest + site.state.eps <= 0:
        raise Refusal("Its running_var and eps are both 0, so it divides by zero.")
    affine = Affine.of_norm(mean, var, weight, bias, site.state.eps)
    return tuple(_merge_host(model, host, affine) for host in site.hosts)


def _merge_host(model: Module, host: Host, affine: Affine) -> Merged:
    module = model.get_submodule(host.name)
    weight, bias = module._parameters[host.weight], module._parameters[host.bias]
    assert weight is not None
    on_device = Affine(affine.scale.to(weight.device), affine.shift.to(weight.device))
    new_weight, new_bias = host.operator.absorb(on_device, weight, bias, host.groups)
    merged = Merged(
        host,
        _parameter(new_weight, weight, weight.requires_grad),
        _parameter(new_bias, weight if bias is None else bias, (weight if bias is None else bias).requires_grad),
    )
    for name, old, new in ((host.weight, weight, merged.weight), (host.bias, bias, merged.bias)):
        if not bool(torch.isfinite(new).all()):
            broken = old is not None and not bool(torch.isfinite(old).all())
            why = "is not finite" if broken else f"would overflow {str(new.dtype).removeprefix('torch.')}"
            raise Refusal(f"The {'' if broken else 'merged '}{name} of {host.name} {why}.")
    return merged


def _parameter(value: Tensor, like: Tensor, requires_grad: bool) -> Parameter:
    """Round ``value`` to the dtype, device and memory format of ``like``."""
    data = torch.empty_like(like, requires_grad=False) if like.shape == value.shape else like.new_empty(value.shape)
    with torch.no_grad():
        data.copy_(value)
    return Parameter(data, requires_grad=requires_grad)


class Rewrite:
    """Changes to a model's module tree that can be taken back."""

    def __init__(self) -> None:
        self._undo: list[tuple[dict[str, Any], str, Any]] = []

    def fold(self, model: Module, site: Site, merged: Sequence[Merged]) -> None:
        """Give the hosts their merged parameters, and put an identity in every place where the norm is registered."""
        for host in merged:
            parameters = model.get_submodule(host.host.name)._parameters
            self._set(parameters, host.host.weight, host.weight)
            self._set(parameters, host.host.bias, host.bias)
        norm = model.get_submodule(site.module)
        stand_in = Identity().train(norm.training)
        for module in model.modules():
            for name, child in list(module._modules.items()):
                if child is norm:
                    self._set(module._modules, name, stand_in)

    def roll_back(self) -> None:
        """Put everything back as it was."""
        while self._undo:
            slots, name, old = self._undo[-1]
            slots[name] = old
            self._undo.pop()

    def _set(self, slots: dict[str, Any], name: str, new: Any) -> None:
        self._undo.append((slots, name, slots[name]))
        slots[name] = new
