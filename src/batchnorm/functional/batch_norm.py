"""Batch normalization as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from batchnorm.functional import dispatch
from batchnorm.functional.operator import batch_norm_operator, composite
from batchnorm.functional.validation import HALF, check_extras, check_valid_counts, first_problem
from batchnorm.kernels.contract import NO_COUNTERS, Backend, Counters, Request
from batchnorm.observers import transformed

__all__ = ["batch_norm"]

Where: TypeAlias = str | Callable[[], str]
"""What an error message opens with; a callable is asked only if there is an error."""


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""Normalize every channel, scale and shift it, add a residual, and apply an activation.

    .. math::

        y = \mathrm{act}\!\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \mathrm{residual}\right)

    In training μ = (1/n) Σ xᵢ and σ² = (1/n) Σ (xᵢ − μ)², the biased variance with divisor n, over the n valid
    values of the channel in this batch; the running statistics move by r ← (1 − momentum)·r + momentum·b, where b is μ
    and the *unbiased* variance, divisor n − 1. In evaluation μ and σ² are the running statistics.

    Args:
        input: x, shape (N, C) or (N, C, \*space), any memory layout; float32, float64, float16 or bfloat16.
        running_mean: shape (C,), updated in place in training; None keeps none.
        running_var: shape (C,), likewise.
        weight: γ, shape (C,); None means 1.
        bias: β, shape (C,); None means 0.
        training: take the statistics from the batch.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance; same unit.
        activation: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"leaky_relu(0.2)"`` (any slope), ``"relu6"``,
            ``"hardswish"``, ``"silu"``, ``"sigmoid"``, ``"tanh"``, ``"gelu"`` (with erf), or None.
        residual: added before the activation; shape and dtype of the input.
        mask: bool, True where a position is valid; shape (N, \*space), or one that broadcasts to the input's. What
            stands at the other positions, even NaN, has no influence: it enters no statistic, and output and gradients
            are exactly 0 there, in training and in evaluation.
        inplace: the input may be overwritten, and must not be read afterwards. Where it saves memory it is: without
            activation and with ``"leaky_relu"``, which can be inverted, y takes the place of x, and the backward pass
            finds x̂ again from y; channels whose γ is too small beside β for that (``|β| > 8·|γ|``) keep their input.
            With the other activations x is needed, and stays. Weights mean the same as without it. Gradients of
            gradients cannot be taken then.

    Returns:
        y, of the shape, dtype and memory layout of the input.

    Raises:
        ShapeError: a value or shape cannot be used: eps, a single value per channel in training, residual, mask. A
            ``ValueError``, as in torch.
        InputError: sizes, dtypes or devices do not fit, or statistics are missing. A ``RuntimeError``, as in torch.
        ArgumentTypeError: something is no tensor. A ``TypeError``.
        UnknownNameError: there is no such activation. A ``KeyError``.

    Example:
        >>> import torch
        >>> from batchnorm.functional import batch_norm
        >>> x = torch.tensor([[1.0], [3.0], [100.0]])
        >>> mean, var = torch.zeros(1), torch.ones(1)
        >>> valid = torch.tensor([True, True, False])
        >>> batch_norm(x, mean, var, training=True, momentum=1.0, mask=valid).round(decimals=4)
        tensor([[-1.],
                [ 1.],
                [ 0.]])
        >>> mean, var
        (tensor([2.]), tensor([2.]))

    Source: Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", algorithm 1 and section 3.1.
    """
    return normalize(
        "batch_norm",
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        activation,
        residual,
        mask,
        inplace,
    )


def normalize(
    where: Where,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    inplace: bool = False,
    counters: Counters = NO_COUNTERS,
) -> Tensor:
    """Do what :func:`batch_norm` does, and count the batch in training; messages open with ``where``."""
    if getattr(input, "dtype", None) in HALF:
        weight, bias = (_widen_parameter(running_mean, parameter, input.dtype) for parameter in (weight, bias))
    call = (input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, inplace)
    extras = activation is not None or residual is not None
    backend = None if mask is not None else dispatch.quick_choice(input, training, extras)
    if backend is dispatch.NATIVE:  # which takes nothing that has to be checked
        y = backend.serve(call, counters, False)
        if y is not None:
            return y
        backend = None
    if extras or mask is not None:
        check_extras(_text(where), input, activation, residual, mask)
    forced = False
    if backend is None:
        forced = dispatch.is_forced()
        backend = dispatch.choose(Request(input, weight, bias, training, activation, residual, mask))
    if mask is None:
        try:
            y = backend.serve(call, counters, forced)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            _check(where, *call[:8])
            raise
        if y is not None:
            return y
        if not isinstance(backend, Backend):
            backend = dispatch.instead_of_torch(Request(input, weight, bias, training, activation, residual))
    _check(where, *call[:8])
    if training and mask is not None:
        check_valid_counts(_text(where), input, mask)
    return _operator()(*call[:8], mask, residual, activation, backend.name, counters.batches, counters.refused)


def _widen_parameter(running: Tensor | None, parameter: Tensor | None, half: torch.dtype) -> Tensor | None:
    """Return γ or β in float32, if it is half as wide as the running statistics: kernels take both of one dtype."""
    if parameter is None or running is None or parameter.dtype != half or running.dtype != torch.float32:
        return parameter
    return parameter.float()


def _operator() -> Callable[..., Tensor]:
    """Return the operator; under vmap, grad and their like what it is made of, for they look into no operator."""
    if not torch.compiler.is_compiling() and transformed():
        return composite
    return batch_norm_operator


def _check(where: Where, input: Tensor, *call: Any) -> None:
    """Raise what a call deserves, whose arguments are those of :func:`batch_norm` up to ``eps``."""
    state = dict(zip(("running_mean", "running_var", "weight", "bias"), call[:4], strict=True))
    problem = first_problem(_text(where), input, state, *call[4:])
    if problem is not None:
        raise problem


def _text(where: Where) -> str:
    return where if isinstance(where, str) else where()
