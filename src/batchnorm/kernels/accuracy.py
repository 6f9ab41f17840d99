"""How exact every backend must be: a table, and the error bounds that follow from it, which tests read.

A backend computes in a *working* precision and rounds its result once to the dtype of the data. Bounds are stated in
units of eps of the two, against magnitudes: sums of the absolute values of the terms that a result is made of, because
no order of summation can do better where they cancel. The units count the roundings of the formulas (Higham 2002,
"Accuracy and Stability of Numerical Algorithms", ch. 2-4), each of which adds at most half a unit:

- ``moments``: deviations from a shift near the mean (half), their squares (half), summed in blocks whose partial sums
  are added in float64 (3). The roundings of a block's additions are taken for random. M2 is what is left of the squares
  when the shift's distance from the mean is taken out; of which it may explain half, hence twice the units.
- ``normalize``: mean, rstd and weight · rstd brought to the working precision (1.5), difference, product, and the two
  additions (2), times the steepest slope of an activation, hardswish's 1.5: 5.25, so 6. The activation's own library
  function: 4.
- ``backward``: the derivative of the activation taken at a rounded argument (6 + 4), x̂ twice (2 · 2), the sums (4),
  products, differences and the scale (6): 24.
- ``recovered``: where the output has taken the place of the input, x̂ = (y − bias)/weight is found from a y that was
  rounded to its dtype (half), with a difference and a quotient (1) and, behind leaky ReLU, two products (1): 3 units of
  eps of the dtype itself, against |x̂| + |bias/weight|. Where |bias| > 8·|weight| the input is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.kernels.contract import Transform
from batchnorm.moments import Moments

__all__ = [
    "ACCURACY",
    "Accuracy",
    "BackwardBounds",
    "backward_bounds",
    "moments_bounds",
    "normalize_bound",
    "recovered_bound",
    "train_forward_bound",
]


@dataclass(frozen=True)
class Accuracy:
    """The largest error against float64, for data of one dtype.

    Attributes:
        dtype: of the data; a result is rounded to it once: ``storage`` units of eps(dtype) × |result|.
        working: the precision in which a backend may compute.
        storage: half a unit is a correct rounding.
        moments: units of eps(working) in mean (× standard deviation) and, twice that, in M2 (× M2).
        normalize: units of eps(working) × (|weight|·rstd·(|x| + |mean|) + |bias| + |residual|).
        activation: units of eps(working) × |y|.
        backward: units of eps(working) × the magnitudes of :func:`backward_bounds`.
        recovered: in place, units of eps(dtype) × (|x̂| + |bias/weight|) in x̂, see :func:`recovered_bound`.
    """

    dtype: torch.dtype
    working: torch.dtype
    storage: float = 0.5
    moments: float = 4.0
    normalize: float = 6.0
    activation: float = 4.0
    backward: float = 24.0
    recovered: float = 3.0

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number, of the data."""
        return torch.finfo(self.dtype).eps

    @property
    def working_eps(self) -> float:
        """Distance from 1 to the next number, in the working precision."""
        return torch.finfo(self.working).eps


ACCURACY: dict[torch.dtype, Accuracy] = {
    torch.float64: Accuracy(torch.float64, working=torch.float64),
    torch.float32: Accuracy(torch.float32, working=torch.float32),
    torch.bfloat16: Accuracy(torch.bfloat16, working=torch.float32),
    torch.float16: Accuracy(torch.float16, working=torch.float32),
}

_EPS64 = torch.finfo(torch.float64).eps


def moments_bounds(x: Tensor, exact: Moments, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the largest errors of mean and M2, float64, (C,).

    The second term of the mean is a float64 sum of n values in any order: n · eps(float64) · (Σ|x| / n). The last of M2
    is what the rounding of the means of blocks does to the terms δ²·n·m/(n + m) that merge them: δ is off by 2 + b/4
    units, where b ≤ n/16 blocks have been merged, and Σ |δ|·n·m/(n + m) ≤ √(n·M2).
    """
    a = ACCURACY[x.dtype]
    n = exact.count.clamp(min=1)
    total = _channel_sum(_valid(x.double().abs(), mask))
    mean = a.moments * a.working_eps * (exact.m2 / n).sqrt() + _EPS64 * total
    delta = (2 + n / 64) * _EPS64 * exact.mean.abs()
    m2 = (2 * a.moments * a.working_eps + n * _EPS64) * exact.m2 + n * mean.square()
    m2 = m2 + 2 * delta * (n * exact.m2).sqrt()
    return mean, m2


def normalize_bound(x: Tensor, transform: Transform, exact: Tensor) -> Tensor:
    """Return the largest error of y, float64, of the shape of x; ``exact`` is y in float64."""
    a = ACCURACY[x.dtype]
    rounding = a.storage * a.eps + a.activation * a.working_eps
    # below the smallest normal number the spacing is constant
    tiny = torch.finfo(a.dtype).tiny * a.eps
    return rounding * exact.abs() + a.normalize * a.working_eps * _magnitude(x, transform) + tiny


def train_forward_bound(x: Tensor, transform: Transform, exact: Tensor, moments: Moments) -> Tensor:
    """Return the largest error of y where the backend also takes the statistics, float64, of the shape of x.

    To :func:`normalize_bound` comes what the errors of mean and variance do to x̂: δmean · rstd + |x̂| · δvar · rstd²/2,
    scaled by |weight| and the steepest slope of an activation, 1.5.
    """
    of_mean, of_m2 = moments_bounds(x, moments, transform.mask)
    var = of_m2 / moments.count.clamp(min=1)
    xhat = _column(transform.rstd, x) * (x.double() - _column(transform.mean, x)).abs()
    shift = _column(of_mean * transform.rstd, x) + xhat * _column(0.5 * var * transform.rstd.square(), x)
    if transform.weight is not None:
        shift = shift * _column(transform.weight, x).abs()
    return normalize_bound(x, transform, exact) + _valid(1.5 * shift, transform.mask)


@dataclass(frozen=True)
class BackwardBounds:
    """The largest errors of the backward phases, float64.

    Attributes:
        sum_dy: (C,).
        sum_dy_xhat: (C,).
        input: of the shape of x.
        residual: of the shape of x.
    """

    sum_dy: Tensor
    sum_dy_xhat: Tensor
    input: Tensor
    residual: Tensor


def backward_bounds(dy: Tensor, x: Tensor, transform: Transform, exact_input: Tensor) -> BackwardBounds:
    """Return the bounds, away from the kinks of an activation; ``exact_input`` is dx in float64.

    With X = rstd·(|x| + |mean|) and G = |dy| without activation, else |dy|·(1.5 + the magnitude of its argument), they
    are in units of eps(working): Σ G; Σ G·X; |weight|·rstd·(G + ΣG/n + X·Σ(G·X)/n); G.
    """
    a = ACCURACY[x.dtype]
    t = transform
    steep = 1.0 if t.activation is None else 1.5 + _magnitude(x, t)
    g = _valid(dy.double().abs() * steep, t.mask)
    xhat = _valid(_column(t.rstd, x) * (x.double().abs() + _column(t.mean, x).abs()), t.mask)
    units = a.backward * a.working_eps
    n = _channel_sum(_valid(torch.ones_like(x, dtype=torch.float64), t.mask)).clamp(min=1)
    sum_g, sum_gx = _channel_sum(g), _channel_sum(g * xhat)
    scale = t.rstd if t.weight is None else t.rstd * t.weight.double().abs()
    terms = g + _column(sum_g / n, x) + xhat * _column(sum_gx / n, x)
    tiny = torch.finfo(a.dtype).tiny * a.eps
    of_input = a.storage * a.eps * exact_input.double().abs() + units * _column(scale, x) * terms + tiny
    return BackwardBounds(units * sum_g, units * sum_gx, of_input, (a.storage * a.eps + units) * g + tiny)


def recovered_bound(dy: Tensor, x: Tensor, transform: Transform, exact_input: Tensor) -> BackwardBounds:
    """Return :func:`backward_bounds` for a backward pass that finds x̂ from the output.

    With e the error of x̂, there comes e·Σ|g| to Σg·x̂, and |weight|·rstd·(e·|Σg·x̂| + X·Σ(e·|g|))/n to dx.
    """
    a = ACCURACY[x.dtype]
    t = transform
    bounds = backward_bounds(dy, x, t, exact_input)
    weight = torch.ones_like(t.rstd) if t.weight is None else t.weight.double().abs()
    ratio = torch.zeros_like(t.rstd) if t.bias is None else t.bias.double().abs() / weight
    xhat = (x.double() - _column(t.mean, x)).abs() * _column(t.rstd, x)
    error = a.recovered * a.eps * (xhat + _column(ratio, x))
    g = dy.double().abs()
    n = x.numel() / x.shape[1]
    of_sum = _channel_sum(error * g)
    scale = _column(t.rstd * weight, x)
    of_input = scale * (error * _column(_channel_sum(g * xhat) / n, x) + xhat * _column(of_sum / n, x))
    return BackwardBounds(bounds.sum_dy, bounds.sum_dy_xhat + of_sum, bounds.input + of_input, bounds.residual)


def _magnitude(x: Tensor, t: Transform) -> Tensor:
    total = _column(t.rstd, x) * (x.double().abs() + _column(t.mean, x).abs())
    if t.weight is not None:
        total = total * _column(t.weight, x).abs()
    if t.bias is not None:
        total = total + _column(t.bias, x).abs()
    if t.residual is not None:
        total = total + t.residual.double().abs()
    return _valid(total, t.mask)


def _column(vector: Tensor, x: Tensor) -> Tensor:
    return vector.double().reshape(1, -1, *(1,) * (x.dim() - 2))


def _channel_sum(values: Tensor) -> Tensor:
    return values.sum([0, *range(2, values.dim())])


def _valid(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask, 0.0)
