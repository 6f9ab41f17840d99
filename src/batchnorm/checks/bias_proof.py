r"""The proof that a dropped bias changes nothing, on the values that its layer meets.

Before: y₁ = N(W x + b), with running mean μ. After: y₂ = N'(W x), with running mean μ' = μ − b. Both are computed in
float64 from the tensors as they are stored. With K products a sum, γ_n = n·v / (1 − n·v), v = 2⁻⁵³, every sum errs by
at most γ_n times the sum of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).

*Running statistics.* With s = γ / √(σ² + ε), exact arithmetic would give y₂ − y₁ = s·(μ − b − μ'). The subtraction was
rounded once, in the type of μ with unit roundoff u, and each side spends n = K + 12 operations, so that

.. math::

    |y_1 - y_2| \le |s|\,(u\,|\mu - b| + \eta) + 2\gamma_n M, \qquad
    M = |s|\,(|W||x| + |b| + |\mu| + |\mu'|) + |\beta|

where η is the smallest subnormal number, for a difference below the normal range.

*Batch statistics* (divisor m, the number of values a channel). With ς = √(σ² + ε), each deviation d from the mean is
off by at most e = 2γ_n max(|W||x| + |b|), n = K + m + 12; 1/ς is off by the factor e/ς at most, and by γ_n for the sum
of squares. To first order each side errs by |γ|·(e/ς + (e/ς + γ_n)·|d|/ς) + γ_n|β|. The bound is four times that: twice
for the two sides, and twice for what is of higher order.

Pooling, means and interpolation between layer and norm are averages or maxima of what is compared here, and move by no
more than it does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.absorbers.table import linear_operator_of
from batchnorm.checks.rule import Proof
from batchnorm.dataflow.graph import Call
from batchnorm.models.float64 import float64_gamma, to_float64
from batchnorm.nn.operators import named_arguments

__all__ = ["BiasProof"]

_OPERATIONS = 12
_SAMPLES = 2  # entries of the batch: what holds for any batch holds for a small one


class BiasProof(Proof):
    """Compares a layer and its norm, before and after the bias was dropped, on the input that the layer gets."""

    def __init__(self, before: Module, after: Module, layer: str, norm: str) -> None:
        self._layer = layer
        old, new = before.get_submodule(norm), after.get_submodule(norm)
        bias = before.get_submodule(layer)._parameters["bias"]
        assert bias is not None
        assert isinstance(old, _BatchNorm)
        assert isinstance(new, _BatchNorm)
        self._bias = to_float64(bias)
        self._weight = after.get_submodule(layer)._parameters["weight"]
        self._norm = new
        self._mean_type = torch.float64 if new.running_mean is None else new.running_mean.dtype
        # cloned, for the run that is watched may update them
        self._means = [None if n.running_mean is None else to_float64(n.running_mean).clone() for n in (old, new)]
        self._var = None if new.running_var is None else to_float64(new.running_var).clone()

    def __call__(self, call: Call, args: Any, kwargs: Any, result: Any) -> None:
        """Compare, if this is the call of the layer in question."""
        given = named_arguments(call.op, args, kwargs)
        if given.get("weight") is not self._weight:
            return
        operator = linear_operator_of(call)
        assert operator is not None
        axis = operator.channel_axis(given["input"].dim())
        x, weight = to_float64(given["input"][:_SAMPLES]), to_float64(given["weight"])

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = call.op(**{**given, "input": x, "weight": weight, "bias": bias})
            assert isinstance(out, Tensor)
            return out.movedim(axis, 0).flatten(1)

        sides = apply(x, weight, self._bias), apply(x, weight, None)
        magnitude = apply(x.abs(), weight.abs(), self._bias.abs())
        products = weight.numel() // self._bias.numel()
        in_batch_mode = self._norm.training or self._var is None
        compare = self._by_batch if in_batch_mode else self._by_running
        gap, bound = compare(sides, magnitude, products + _OPERATIONS)
        # where x itself overflows there is nothing to compare
        excess = torch.where(torch.isfinite(magnitude), gap / bound, 0.0)
        worst = float(excess.max()) if excess.numel() else 0.0
        if not worst <= 1:  # NaN is not
            self.problem = f"Without its bias, {self._layer} errs by {worst:.3g} times the bound of its rounding."

    def _by_running(self, sides: tuple[Tensor, Tensor], magnitude: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return the differences of the normalized values, one row a channel, and their bound."""
        gamma, beta = self._affine(sides[0])
        before, after = (mean[:, None] for mean in self._means if mean is not None)
        assert self._var is not None
        s = gamma / (self._var + self._norm.eps).sqrt()[:, None]
        gap = ((sides[0] - before) * s - (sides[1] - after) * s).abs()
        info = torch.finfo(self._mean_type)
        rounded = info.eps / 2 * (before - self._bias[:, None]).abs() + info.smallest_normal * info.eps
        whole = s.abs() * (magnitude + before.abs() + after.abs()) + beta.abs()
        return gap, s.abs() * rounded + 2 * float64_gamma(n) * whole

    def _by_batch(self, sides: tuple[Tensor, Tensor], magnitude: Tensor, n: int) -> tuple[Tensor, Tensor]:
        gamma, beta = self._affine(sides[0])
        growth = float64_gamma(n + sides[0].shape[1])
        normalized = []
        for side in sides:
            deviation = side - side.mean(1, keepdim=True)
            spread = (deviation.square().mean(1, keepdim=True) + self._norm.eps).sqrt()
            normalized.append(deviation / spread)
        error = 2 * growth * magnitude.amax(1, keepdim=True) / spread
        side_bound = gamma.abs() * (error + (error + growth) * normalized[1].abs()) + growth * beta.abs()
        tiny = torch.finfo(torch.float64).tiny  # a channel of zeros: no difference, and a bound of zero
        return (gamma * (normalized[0] - normalized[1])).abs(), 4 * side_bound + tiny

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self._norm.weight, self._norm.bias
        gamma = like.new_ones(like.shape[0]) if weight is None else to_float64(weight)
        beta = like.new_zeros(like.shape[0]) if bias is None else to_float64(bias)
        return gamma[:, None], beta[:, None]
