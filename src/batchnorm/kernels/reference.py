"""The single definition of correct: plain torch, everything in float64, one rounding at the end.

Every method but :meth:`Reference.moments` is made of differentiable operators and respects the grad mode, so that the
backward phases can themselves be differentiated: that is where every backend gets its second derivatives from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.activation import Activation, activation_called
from batchnorm.kernels.contract import Backend, Gradients, Reduced, Request, Transform
from batchnorm.moments import Moments

__all__ = ["REFERENCE", "Reference", "statistics"]


class Reference(Backend):
    """Batch normalization by its formulas, in float64, on any device that has it."""

    name = "reference"

    def refusal(self, request: Request) -> str | None:
        """Serve every call on a device that has float64."""
        if request.input.device.type == "mps":
            return "it computes in float64, which the device 'mps' does not have"
        return None

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Moments:
        """Return count, mean and M2 of the valid values, per channel."""
        return Moments.of(x, mask=mask)

    def normalize(self, x: Tensor, transform: Transform) -> Tensor:
        """Return activation(weight · x̂ + bias + residual), rounded once."""
        z = _before_activation(_standardized(x, transform), x, transform)
        if transform.activation is not None:
            z = _called(transform.activation).function(z)
        return _valid(z, transform.mask).to(x.dtype)

    def backward_reduce(self, dy: Tensor, x: Tensor, transform: Transform) -> Reduced:
        """Return the number of valid values, Σg and Σg·x̂."""
        xhat = _standardized(x, transform)
        g = _through_activation(dy, xhat, x, transform)
        return Reduced(_count(x, transform.mask), _sum(g), _sum(g * xhat))

    def backward_input(self, dy: Tensor, x: Tensor, transform: Transform, reduced: Reduced | None) -> Gradients:
        """Return the gradients of x and of the residual."""
        xhat = _standardized(x, transform)
        g = _through_activation(dy, xhat, x, transform)
        dx = g
        if reduced is not None:
            n = reduced.count.clamp(min=1)
            dx = dx - _column(reduced.sum_dy / n, x) - xhat * _column(reduced.sum_dy_xhat / n, x)
        scale = transform.rstd if transform.weight is None else transform.rstd * transform.weight.double()
        dx = _valid(dx * _column(scale, x), transform.mask)
        return Gradients(dx.to(x.dtype), None if transform.residual is None else g.to(x.dtype))


def statistics(x: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and rstd = 1/√(variance + eps) of the valid values as differentiable functions of x, float64, (C,).

    The variance is the biased one, with divisor n.
    """
    count = _count(x, mask).clamp(min=1)
    values = _valid(x.double(), mask)
    mean = _sum(values) / count
    deviation = _valid(values - _column(mean, x), mask)
    return mean, (_sum(deviation.square()) / count + eps).rsqrt()


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """Return a vector over the channels, shaped to broadcast against x, in float64."""
    return vector.double().reshape(1, -1, *(1,) * (x.dim() - 2))


def _sum(values: Tensor) -> Tensor:
    """Return the sum over everything but the channels."""
    return values.sum([0, *range(2, values.dim())])


def _valid(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values with 0 outside the mask.

    Selected and not multiplied, because 0 · NaN is NaN; and by where(), because masked_fill() loses the memory layout.
    """
    return values if mask is None else torch.where(mask, values, 0.0)


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return _sum(mask.double())
    return torch.full((x.shape[1],), x.numel() // max(x.shape[1], 1), dtype=torch.float64, device=x.device)


def _standardized(x: Tensor, t: Transform) -> Tensor:
    return _valid((_valid(x.double(), t.mask) - _column(t.mean, x)) * _column(t.rstd, x), t.mask)


def _before_activation(xhat: Tensor, x: Tensor, t: Transform) -> Tensor:
    z = xhat if t.weight is None else xhat * _column(t.weight, x)
    z = z if t.bias is None else z + _column(t.bias, x)
    return z if t.residual is None else z + _valid(t.residual.double(), t.mask)


def _through_activation(dy: Tensor, xhat: Tensor, x: Tensor, t: Transform) -> Tensor:
    """Return g = dy · activation′(z), 0 outside the mask."""
    g = _valid(dy.double(), t.mask)
    if t.activation is None:
        return g
    return g * _valid(_called(t.activation).derivative(_before_activation(xhat, x, t)), t.mask)


REFERENCE = Reference()


def _called(name: str) -> Activation:
    found = activation_called(name)
    assert found is not None, name
    return found
