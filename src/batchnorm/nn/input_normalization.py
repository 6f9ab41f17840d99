"""The normalization of a data set, as a norm before the first layer, so that it is folded as every other norm is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Module
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.errors import InputError, ShapeError

__all__ = ["WithNormalizedInput"]

_KINDS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


class WithNormalizedInput(Module):
    r"""A model behind :math:`(x - \mathrm{mean}) / \mathrm{std}` of its first input.

    Modules, parameters and buffers have the names here that they have in the model itself, so that a trace shows them
    under those.

    Args:
        model: the model, which takes normalized inputs.
        example_inputs: as the outer model takes them: the first tensor is not normalized, (N, C, ...).
        mean: one number a channel, or one for all.
        std: likewise, positive.

    Raises:
        InputError: there is no floating-point tensor with channels among the inputs.
        ShapeError: the numbers are not as many as the channels, or not finite, or a deviation is not positive.

    Attributes:
        inner: the model, which takes normalized inputs.
        normalization: the norm before it.
        normalization_name: what that is called: ``"input_normalization"``, unless the model has a module of that name.
    """

    def __init__(self, model: Module, example_inputs: Any, mean: Any, std: Any) -> None:
        super().__init__()
        first = next((leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)), None)
        if first is None or not first.is_floating_point() or first.dim() not in _KINDS:
            raise InputError(
                "fold: input_mean and input_std are for a first input of shape (N, C, ...), of real numbers."
            )
        channels = first.shape[1]
        norm = _KINDS[first.dim()](channels, eps=0.0, affine=False, device=first.device)
        norm.running_mean = _vector("input_mean", 0.0 if mean is None else mean, channels).to(first)
        deviation = _vector("input_std", 1.0 if std is None else std, channels)
        if not bool((deviation > 0).all()):
            raise ShapeError(f"fold: input_std: expected positive numbers; got {deviation.tolist()}.")
        norm.running_var = deviation.square().to(first)
        self.normalization = norm.eval()
        self.inner = model
        self.normalization_name = "input_normalization"
        while hasattr(model, self.normalization_name):
            self.normalization_name += "_"
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalize the first tensor and run the model."""
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        normalized = self.normalization(first)
        args, kwargs = tree_map(lambda leaf: normalized if leaf is first else leaf, (args, kwargs))
        return self.inner(*args, **kwargs)

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Yield this module, the normalization, and the model's modules under the names that they have in the model."""
        yield prefix, self
        yield f"{prefix}.{self.normalization_name}".removeprefix("."), self.normalization
        yield from self.inner.named_modules(memo, prefix, remove_duplicate)

    def get_submodule(self, target: str) -> Module:
        """Return the module of a name that :meth:`named_modules` yields; for the empty name the model."""
        return self.normalization if target == self.normalization_name else self.inner.get_submodule(target)


def _vector(name: str, value: float | Sequence[float] | Tensor, channels: int) -> Tensor:
    home = value.device if isinstance(value, Tensor) else "cpu"
    vector = torch.as_tensor(value, dtype=torch.float64, device=home).reshape(-1)
    if not bool(torch.isfinite(vector).all()):
        raise ShapeError(f"fold: {name}: expected finite numbers; got {vector.tolist()}.")
    if vector.numel() not in (1, channels):
        raise ShapeError(
            f"fold: {name}: expected one number, or {channels}, one for each channel; got {vector.numel()}."
        )
    return vector.expand(channels).clone()
