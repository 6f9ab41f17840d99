"""Gradients of any backend: torch.autograd.Functions over its split phases.

First derivatives are the backend's own. Second and higher ones come from the reference: when a backward pass is itself
recorded (``create_graph=True``), it is composed of the differentiable operators of
:class:`~batchnorm.kernels.reference.Reference` instead, so that a backend needs none of its own.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from batchnorm.functional import dispatch
from batchnorm.kernels.contract import Backend, Reduced, Transform, normalizers
from batchnorm.kernels.reference import REFERENCE, statistics
from batchnorm.moments import Moments

__all__ = ["normalize_with_batch_statistics", "normalize_with_given_statistics"]

_Optional: TypeAlias = Tensor | None


def normalize_with_batch_statistics(*call: Any) -> tuple[Tensor, Moments]:
    """Return y, differentiable in x, weight, bias and residual, and the moments of x, which are not.

    The arguments are x, weight, bias, residual, mask, eps, activation and the backend's name.
    """
    y, *moments = _WithBatchStatistics.apply(*call)  # type: ignore[no-untyped-call]
    return y, Moments(*moments)


def normalize_with_given_statistics(*call: Any) -> Tensor:
    """Return y with mean and rstd (float64) held constant, differentiable in x, weight, bias and residual.

    The arguments are x, mean, rstd, weight, bias, residual, mask, activation and the backend's name.
    """
    y: Tensor = _WithGivenStatistics.apply(*call)  # type: ignore[no-untyped-call]
    return y


class _WithBatchStatistics(torch.autograd.Function):
    """Training: mean and rstd depend on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: _Optional,
        bias: _Optional,
        residual: _Optional,
        mask: _Optional,
        eps: float,
        activation: str | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        nothing = x.new_empty(0)  # the backend finds mean and rstd itself
        transform = Transform(nothing, nothing, weight, bias, residual, activation, mask)
        y, m = dispatch.backend(backend).train_forward(x, transform, eps)
        return y, m.count, m.mean, m.m2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, mask, ctx.eps, ctx.activation, ctx.backend = inputs
        _, count, mean, m2 = output
        ctx.mark_non_differentiable(count, mean, m2)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        # without activation the residual's gradient is dy: its values are not needed
        kept = residual if ctx.activation is not None else None
        ctx.save_for_backward(x, weight, bias, kept, mask, count, mean, m2)

    @staticmethod
    def backward(ctx: Any, dy: _Optional, *_: Any) -> tuple[_Optional, ...]:
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual, mask, count, mean, m2 = ctx.saved_tensors
        if torch.is_grad_enabled():
            engine: Backend = REFERENCE
            mean, rstd = statistics(x, mask, ctx.eps)
        else:
            engine = dispatch.backend(ctx.backend)
            mean, rstd = normalizers(Moments(count, mean, m2), ctx.eps)
        residual = _residual_or_dy(residual, ctx.has_residual, dy)
        transform = Transform(mean, rstd, weight, bias, residual, ctx.activation, mask)
        gradients, reduced = engine.train_backward(dy, x, transform)
        return gradients.input, *_of_parameters(reduced, weight, bias), gradients.residual, None, None, None, None


class _WithGivenStatistics(torch.autograd.Function):
    """Evaluation: mean and rstd are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: _Optional,
        bias: _Optional,
        residual: _Optional,
        mask: _Optional,
        activation: str | None,
        backend: str,
    ) -> Tensor:
        transform = Transform(mean, rstd, weight, bias, residual, activation, mask)
        return dispatch.backend(backend).normalize(x, transform)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, mean, rstd, weight, bias, residual, mask, ctx.activation, ctx.backend = inputs
        ctx.has_residual = residual is not None
        kept = residual if ctx.activation is not None else None
        ctx.save_for_backward(x, mean, rstd, weight, bias, kept, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[_Optional, ...]:
        x, mean, rstd, weight, bias, residual, mask = ctx.saved_tensors
        engine = REFERENCE if torch.is_grad_enabled() else dispatch.backend(ctx.backend)
        residual = _residual_or_dy(residual, ctx.has_residual, dy)
        transform = Transform(mean, rstd, weight, bias, residual, ctx.activation, mask)
        gradients = engine.backward_input(dy, x, transform, None)
        of_parameters: tuple[_Optional, _Optional] = (None, None)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            of_parameters = _of_parameters(engine.backward_reduce(dy, x, transform), weight, bias)
        return gradients.input, None, None, *of_parameters, gradients.residual, None, None, None


def _residual_or_dy(residual: _Optional, has_residual: bool, dy: Tensor) -> _Optional:
    """Return a residual for the backward phases, which read its values only where there is an activation."""
    return dy if residual is None and has_residual else residual


def _of_parameters(reduced: Reduced, weight: _Optional, bias: _Optional) -> tuple[_Optional, _Optional]:
    return (
        None if weight is None else reduced.sum_dy_xhat.to(weight.dtype),
        None if bias is None else reduced.sum_dy.to(bias.dtype),
    )
