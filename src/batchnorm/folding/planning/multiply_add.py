"""What takes the place of a norm that no layer can absorb: one multiply-add per channel, with its activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from batchnorm.dataflow.norms import NormUse
from batchnorm.folding.planning.removable_norm import NormState
from batchnorm.folding.planning.replacement import Replacement
from batchnorm.models.parameters import find_tensor
from batchnorm.nn.scale_shift import ScaleShift

__all__ = ["MultiplyAdd"]


@dataclass(frozen=True, eq=False)
class MultiplyAdd:
    """A norm that becomes a multiply-add.

    Attributes:
        use: the norm.
        module: the qualified name of its module.
        state: the names of its tensors.
        scale: s, float64, (C,).
        shift: t, likewise.
        activation: the module of the activation that is computed with it, or None.
        function: the name of that in ``batchnorm.kernels.activation.ACTIVATIONS``.
        moved: the name under which the activation stands in the model, if an identity is to take its place there.
    """

    use: NormUse
    module: str
    state: NormState
    scale: Tensor
    shift: Tensor
    activation: str | Module | None
    function: str | None
    moved: str | None

    @property
    def name(self) -> str:
        """What a report calls the norm."""
        return self.use.name

    @property
    def description(self) -> str:
        """What stands in the norm's place, for a reader."""
        return f"one multiply-add per channel{f', with its {self.function}' if self.function else ''}"

    def build(self, model: Module) -> ScaleShift:
        """Return what takes the place of the norm in ``model``: float64 values rounded once to its type."""
        norm, like = model.get_submodule(self.module), find_tensor(model, self.state.running_mean)
        assert like is not None
        learns = any(p.requires_grad for p in norm.parameters(recurse=False))
        weight, bias = (Parameter(_rounded(v, like), learns) for v in (self.scale, self.shift))
        activation = self.activation
        if isinstance(activation, str):
            owner = model if self.moved is not None else norm
            activation = owner.get_submodule(activation)
        built = ScaleShift(weight, bias, activation, self.function)
        built.training = norm.training
        return built

    def replacement(self, model: Module) -> Replacement:
        """Return what stands in the norm's place in ``model``; an activation that moves there is not in it."""
        built = self.build(model)
        built.activation = None
        own = self.activation if self.moved is None else None
        return Replacement((built,) if own is None else (built, own))


def _rounded(values: Tensor, like: Tensor) -> Tensor:
    """Return values in the type of statistics; of half precision ones in float32, in which kernels compute."""
    return values.to(like.device, like.dtype if like.dtype == torch.float64 else torch.float32)
