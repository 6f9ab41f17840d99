"""One algebra for everything that is added up: count, mean and M2 per channel, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.errors import ArgumentTypeError, InputError, ShapeError

__all__ = ["Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    r"""The first two moments of a set of values, per channel.

    .. math::

        \mathrm{mean} = \frac1n \sum_i x_i \qquad M_2 = \sum_i (x_i - \mathrm{mean})^2

    Two disjoint sets merge exactly (Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances", eq. 2.1), with :math:`\delta = \mathrm{mean}_b - \mathrm{mean}_a`:

    .. math::

        n = n_a + n_b \qquad \mathrm{mean} = \mathrm{mean}_a + \delta\,\tfrac{n_b}{n} \qquad
        M_2 = M_{2,a} + M_{2,b} + \delta^2\,\tfrac{n_a n_b}{n}

    Nothing here computes E[x²] − E[x]², which loses every digit once mean² is large beside the variance.

    Attributes:
        count: number of values per channel, float64, shape (C,).
        mean: their mean, float64, shape (C,); 0 where the count is 0.
        m2: sum of squared deviations from the mean, float64, shape (C,). It has no divisor; see :meth:`variance`.

    Example:
        >>> import torch
        >>> from batchnorm.moments import Moments
        >>> a = Moments.of(torch.tensor([[1.0], [2.0]]))
        >>> b = Moments.of(torch.tensor([[6.0]]))
        >>> a.merge(b)
        Moments(count=[3.0], mean=[3.0], m2=[14.0])
        >>> a.merge(b).variance(correction=1)
        tensor([7.], dtype=torch.float64)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        for name in ("count", "mean", "m2"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.float64 or tensor.shape != self.count.shape or tensor.dim() != 1:
                raise ShapeError(
                    f"Moments.{name}: expected a float64 tensor of shape {tuple(self.count.shape)}, one value per "
                    f"channel; got {tensor.dtype} of shape {tuple(tensor.shape)}."
                )

    @classmethod
    def zero(cls, num_features: int, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no values at all: the neutral element of :meth:`merge`."""
        z = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(z, z.clone(), z.clone())

    @classmethod
    def of(cls, x: Tensor, *, channel_dim: int = 1, mask: Tensor | None = None) -> Moments:
        """Return the moments of ``x`` over every dimension but ``channel_dim``, in any memory layout.

        Args:
            x: values, floating point; (N, C), (N, C, L), (N, C, H, W), ... or with the channels elsewhere.
            channel_dim: which dimension holds the channels.
            mask: True where a value counts. Either of the shape of ``x`` without the channel dimension (padding of
                a sequence: (N, L)), or broadcastable to the shape of ``x``.

        Raises:
            ShapeError: ``x`` has no such dimension, or the mask does not fit.
            InputError: ``x`` is not floating point, or the mask is not boolean.
            ArgumentTypeError: ``x`` is no tensor.
        """
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(f"Moments.of: expected a tensor; got {type(x).__name__}.")
        if not x.is_floating_point():
            raise InputError(f"Moments.of: expected a floating-point tensor; got {x.dtype}. Convert it with x.float().")
        if not -x.dim() <= channel_dim < x.dim():
            raise ShapeError(f"Moments.of: channel_dim={channel_dim}, but x has shape {tuple(x.shape)}.")
        dim = channel_dim % x.dim()
        values = math.prod(s for i, s in enumerate(x.shape) if i != dim)  # per channel; reshape(-1, 0) would not know
        rows = x.detach().movedim(dim, -1).reshape(values, x.shape[dim]).double()
        if mask is not None:
            weight = expand_mask(mask, x, dim).movedim(dim, -1).reshape(rows.shape).double()
            count = weight.sum(0)
            # where(), not a product: 0 · inf would let a padded infinity through
            rows = torch.where(weight > 0, rows, 0.0)
            mean = rows.sum(0) / count.clamp(min=1)
            deviation = torch.where(weight > 0, rows - mean, 0.0)
        else:
            count = rows.new_full((rows.shape[1],), rows.shape[0])
            mean = rows.sum(0) / max(rows.shape[0], 1)
            deviation = rows - mean
        # The corrected two-pass algorithm: the second term is zero but for the rounding of the mean.
        m2 = deviation.square().sum(0) - deviation.sum(0).square() / count.clamp(min=1)
        return cls(count, mean, m2.clamp(min=0))

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self.count.numel()

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together, as if they had been measured as one.

        Raises:
            ShapeError: the two do not have the same number of channels.
        """
        if self.num_features != other.num_features:
            raise ShapeError(
                f"Moments.merge: cannot merge {self.num_features} channels with {other.num_features}; "
                "both must come from the same layer."
            )
        count = self.count + other.count
        share = other.count / torch.where(count > 0, count, 1.0)  # counts may be weights below 1
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta.square() * self.count * share,
        )

    __add__ = merge

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same numbers, exactly. Rounding depends on the order of merging."""
        if not isinstance(other, Moments):
            return NotImplemented
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in ("count", "mean", "m2"))

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash of their values

    def variance(self, correction: float = 0) -> Tensor:
        """Return M2 / (count − correction), float64, shape (C,).

        Args:
            correction: 0 gives the biased variance (divisor n), which normalizes a batch; 1 the unbiased one (divisor
                n − 1), which PyTorch keeps in ``running_var``. NaN where count ≤ correction: no variance is defined.
        """
        divisor = self.count - correction
        return torch.where(divisor > 0, self.m2 / divisor, torch.nan)

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments on another device."""
        return Moments(self.count.to(device), self.mean.to(device), self.m2.to(device))

    def isfinite(self) -> Tensor:
        """Return which channels hold finite moments, bool, shape (C,)."""
        return torch.isfinite(self.mean) & torch.isfinite(self.m2)

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``{"count", "mean", "m2"}``, copies, ready for safetensors or ``torch.save``."""
        return {"count": self.count.clone(), "mean": self.mean.clone(), "m2": self.m2.clone()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Moments:
        """Return the moments that :meth:`state_dict` saved.

        Raises:
            InputError: a key is missing or one too many.
        """
        if set(state) != {"count", "mean", "m2"}:
            raise InputError(
                "Moments.from_state_dict: expected the keys count, mean and m2; got "
                f"{', '.join(sorted(state)) or 'none'}."
            )
        return cls(*(state[key].double().clone() for key in ("count", "mean", "m2")))

    def __repr__(self) -> str:
        """Show the three vectors; long ones are cut."""

        def short(t: Tensor) -> str:
            values = [float(f"{v:.6g}") for v in t[:4].tolist()]
            return f"{values}"[:-1] + (", ...]" if t.numel() > 4 else "]")

        return f"Moments(count={short(self.count)}, mean={short(self.mean)}, m2={short(self.m2)})"


def expand_mask(mask: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """Return ``mask`` as a boolean tensor of the shape of ``x``.

    A mask with one dimension fewer than ``x`` lacks the channels; one with as many is broadcast.

    Raises:
        InputError: the mask is not boolean.
        ShapeError: it cannot be broadcast to ``x``.
    """
    if mask.dtype != torch.bool:
        raise InputError(f"mask: expected a boolean tensor, True where a value counts; got {mask.dtype}.")
    full = mask.unsqueeze(channel_dim) if mask.dim() == x.dim() - 1 else mask
    try:
        return full.expand(x.shape)
    except RuntimeError as error:
        without = tuple(s for i, s in enumerate(x.shape) if i != channel_dim)
        raise ShapeError(
            f"mask: expected shape {without} (positions without channels), or one that broadcasts to "
            f"{tuple(x.shape)}; got {tuple(mask.shape)}."
        ) from error
