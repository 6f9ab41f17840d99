"""A folded model's parameters and replacements, put into the module tree."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Identity, Module, Parameter

from batchnorm.dataflow.refusal import Refusal
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.plan import FoldPlan
from batchnorm.models.modules import become
from batchnorm.models.parameters import find_tensor, put_parameter
from batchnorm.nn.bordered import bordered

__all__ = ["replace_by_id", "replace_modules", "rewrite", "round_parameters"]


def round_parameters(model: Module, parameters: Parameters) -> dict[str, Parameter]:
    """Return the new parameters of ``model``, by name: float64 values rounded once to the types of the old ones.

    Raises:
        Refusal: one does not fit into its type.
    """
    return {name: _rounded(model, name, value, parameters) for name, value in parameters.changed.items()}


def _rounded(model: Module, name: str, value: Tensor, parameters: Parameters) -> Parameter:
    old = find_tensor(model, name)
    if old is None:  # a bias where there was none: of its weight's kind
        absorber = next(absorber for absorber in parameters.absorbers.values() if absorber.bias_name == name)
        like = find_tensor(model, absorber.weight_name)
        assert like is not None
    else:
        like = old
    data = _stored(value, like)
    if data.numel() and not all(math.isfinite(end) for end in torch.aminmax(data)):
        place, _, slot = name.rpartition(".")
        broken = old is not None and not bool(torch.isfinite(old).all())
        why = "is not finite" if broken else f"would overflow {str(data.dtype).removeprefix('torch.')}"
        raise Refusal(f"The {'' if broken else 'merged '}{slot} of {place} {why}.", place)
    _require_nearest(data, value, name)
    return Parameter(data, requires_grad=like.requires_grad)


def _stored(value: Tensor, like: Tensor) -> Tensor:
    """Return the value in the type, device and memory format of another tensor."""
    data = torch.empty_like(like, requires_grad=False) if like.shape == value.shape else like.new_empty(value.shape)
    with torch.no_grad():
        data.copy_(value)
    return data


def _require_nearest(data: Tensor, value: Tensor, name: str) -> None:
    """Every number is the nearest to its float64 value that its type holds."""
    if data.dtype == value.dtype and torch.equal(data.cpu(), value.cpu()):
        return
    finfo = torch.finfo(data.dtype)
    # the smallest subnormal number is the spacing near zero
    allowed = value.abs() * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
    if not bool(((data.cpu().double() - value.cpu()).abs() <= allowed.cpu()).all()):
        place, _, slot = name.rpartition(".")
        raise Refusal(f"The merged {slot} of {place} is not the nearest number that {data.dtype} has.", place)


def rewrite(model: Module, plan: FoldPlan, parameters: dict[str, Parameter]) -> None:
    """Set the new parameters; replace norms that go or become multiply-adds, and convolutions that get a border."""
    for name, parameter in parameters.items():
        put_parameter(model, name, parameter)
    replacements = {step.module: step.replacement.build(model.get_submodule(step.module)) for step in plan.steps}
    for name, border in plan.parameters.borders.items():
        replacements[name] = bordered(model.get_submodule(name), border)
    for item in plan.multiply_adds:
        replacements[item.module] = item.build(model)
        if item.moved is not None:
            replacements[item.moved] = Identity().train(model.get_submodule(item.moved).training)
    replace_modules(model, replacements)


def replace_modules(model: Module, new: Mapping[str, Module]) -> None:
    """Replace the modules of these names, wherever they stand."""
    replace_by_id(model, {id(model.get_submodule(name)): module for name, module in new.items()})


def replace_by_id(model: Module, new: Mapping[int, Module]) -> None:
    """Replace modules, wherever they stand, with those of their ids; the model itself becomes its own one."""
    for module in list(model.modules()):  # as they stand now: a replacement may hold what another one replaces
        for name, child in list(module._modules.items()):
            if id(child) in new:
                module._modules[name] = new[id(child)]
    if id(model) in new:
        become(model, new[id(model)])
