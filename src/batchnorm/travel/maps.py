"""An affine map of every element of a tensor, on its way through the operators that commute with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.dataflow.refusal import Refusal

__all__ = ["Map"]


@dataclass(frozen=True, eq=False)
class Map:
    r"""The map :math:`y = s x + t`, element by element.

    Scale and shift have as many dimensions as the tensor, of size 1 wherever they do not vary. So which axis holds the
    channels need not be kept in mind: a transposition of the tensor is one of the map.

    Attributes:
        scale: s, float64, broadcastable to the tensor's shape, all dimensions present.
        shift: t, likewise.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def per_channel(cls, scale: Tensor, shift: Tensor, dim: int, axis: int = 1) -> Map:
        """Return the map of a tensor of ``dim`` dimensions that varies along one of them."""
        shape = [1] * dim
        shape[axis] = -1
        return cls(scale.reshape(shape), shift.reshape(shape))

    @classmethod
    def of_norm(cls, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Map:
        r"""Return the map of one dimension, the channels, that a norm with fixed statistics is, computed in float64.

        .. math::

            s = \frac{\gamma}{\sqrt{\mathrm{var} + \varepsilon}} \qquad t = \beta - \mathrm{mean} \cdot s

        ``var`` is taken as it is stored: no divisor is added or removed. Without ``weight`` γ = 1, without ``bias``
        β = 0 (Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2, line 11).

        Example:
            >>> import torch
            >>> from batchnorm.travel.maps import Map
            >>> one = torch.ones(1)
            >>> Map.of_norm(mean=3 * one, var=4 * one, weight=None, bias=one, eps=0.0)
            Map(scale=tensor([0.5000], dtype=torch.float64), shift=tensor([-0.5000], dtype=torch.float64))
        """
        mean, var = mean.detach().double(), var.detach().double()
        scale = torch.rsqrt(var + eps) if weight is None else weight.detach().double() / torch.sqrt(var + eps)
        shift = -mean * scale if bias is None else bias.detach().double() - mean * scale
        return cls(scale, shift)

    @classmethod
    def identity(cls, dim: int) -> Map:
        """Return the map that changes nothing."""
        return cls(
            torch.ones([1] * dim, dtype=torch.float64, device="cpu"),
            torch.zeros([1] * dim, dtype=torch.float64, device="cpu"),
        )

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale == 1).all()) and self.only_scales

    @property
    def only_scales(self) -> bool:
        """Whether the shift is zero everywhere."""
        return bool((self.shift == 0).all())

    @property
    def only_shifts(self) -> bool:
        """Whether the scale is one everywhere."""
        return bool((self.scale == 1).all())

    def same_as(self, other: Map) -> bool:
        """Whether both map every element alike."""
        try:
            return bool((self.scale == other.scale).all()) and bool((self.shift == other.shift).all())
        except RuntimeError:  # shapes that do not go together
            return False

    def then(self, other: Map) -> Map:
        """Return the map that applies this one first, then the other."""
        return Map(other.scale * self.scale, other.scale * self.shift + other.shift)

    def inverse(self) -> Map:
        """Return the inverse, x = y/s − t/s; s is not 0 anywhere."""
        return Map(1 / self.scale, -self.shift / self.scale)

    def each(self, change: Callable[[Tensor], Tensor]) -> Map:
        """Return the map of which scale and shift are changed alike."""
        return Map(change(self.scale), change(self.shift))

    def over(self, shape: Sequence[int]) -> Map:
        """Return the same with a value for every element of a tensor of that shape."""
        return self.each(lambda values: values.expand(tuple(shape)))

    def compact(self) -> Map:
        """Return the same, of size 1 along every dimension along which nothing varies."""
        scale, shift = torch.broadcast_tensors(self.scale, self.shift)
        for axis in range(scale.dim()):
            first = (scale.narrow(axis, 0, 1), shift.narrow(axis, 0, 1)) if scale.shape[axis] > 1 else None
            if first is not None and bool((scale == first[0]).all()) and bool((shift == first[1]).all()):
                scale, shift = first
        return Map(scale.clone(), shift.clone())

    def fitting(self, shape: Sequence[int]) -> Map:
        """Return the map of an operand of that shape which is broadcast to the tensor that this is the map of.

        Raises:
            Refusal: it differs between places that the operand has one value for.
        """
        extra = self.scale.dim() - len(shape)
        scale, shift = torch.broadcast_tensors(self.scale, self.shift)
        for axis in range(extra):
            if scale.shape[axis] != 1:
                raise Refusal("An operand is broadcast along the axis of the channels.")
        scale, shift = (values.reshape(values.shape[extra:]) for values in (scale, shift))
        if any(have != 1 and size == 1 for have, size in zip(scale.shape, shape, strict=True)):
            raise Refusal("An operand is broadcast along the axis of the channels.")
        return Map(scale, shift)

    def along(self, axis: int, size: int) -> tuple[Tensor, Tensor]:
        """Return scale and shift as vectors along one axis.

        Raises:
            Refusal: they vary along another one.
        """
        scale, shift = torch.broadcast_tensors(self.scale, self.shift)
        axis %= scale.dim()
        if any(have != 1 for place, have in enumerate(scale.shape) if place != axis):
            raise Refusal("The map varies along another axis than that of the channels.")
        return scale.reshape(-1).expand(size), shift.reshape(-1).expand(size)
