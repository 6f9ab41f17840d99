"""The native kernels' short way: one autograd node a call, running statistics and all, past torch's dispatcher.

Most calls in training and inference on the CPU are plain: ordinary tensors, nobody watching. They need neither an
operator that others can see nor float64 moments as tensors, and for a small layer those cost more than the norm itself.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, TypeAlias

import torch
from torch import Tensor

from batchnorm.errors import StateError
from batchnorm.functional.observing import observed
from batchnorm.kernels.activation import LEAKY_SLOPE
from batchnorm.kernels.contract import Transform
from batchnorm.kernels.native import calls
from batchnorm.kernels.native.backend import is_ordinary, untransformed
from batchnorm.kernels.native.calls import Saved
from batchnorm.kernels.native.layout import DTYPES, is_dense
from batchnorm.kernels.reference import REFERENCE, statistics

__all__ = ["fused_batch_norm", "is_direct"]

_Optional: TypeAlias = Tensor | None


def is_direct(
    x: Tensor,
    running_mean: _Optional,
    running_var: _Optional,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """Whether a call may go this way: plain tensors that fit together, nothing left to check, nobody watching.

    Every other call takes the long way, where it is checked in full and errors find their words.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not untransformed():
        return False
    if not (is_ordinary(x) and x.dim() > 1 and x.dtype in DTYPES and x.is_cpu and is_ordinary(residual)):
        return False
    if observed() or torch._C._len_torch_dispatch_stack() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if not isinstance(momentum, float | int) or not isinstance(eps, float | int):
        return False
    channels, size = x.shape[1], x.numel()
    if training:
        fits = (running_mean is None) == (running_var is None) and size > channels and eps > 0
    else:
        fits = running_mean is not None and running_var is not None and size > 0 and eps >= 0
    wanted = calls.compute_dtype(x.dtype)
    for t in (running_mean, running_var, weight, bias):
        if t is None:
            continue
        if not (isinstance(t, Tensor) and is_ordinary(t) and t.is_cpu and t.is_contiguous()):
            return False
        if t.dtype != wanted or t.numel() != channels:
            return False
        if t.requires_grad and (t is running_mean or t is running_var):
            return False
    return fits


def fused_batch_norm(
    input: Tensor,
    running_mean: _Optional,
    running_var: _Optional,
    weight: _Optional,
    bias: _Optional,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: _Optional,
    inplace: bool,
) -> Tensor:
    """Do what :func:`batchnorm.functional.batch_norm` does; the arguments have been checked."""
    tracked = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias, residual)
    )
    # autograd forbids to write over these
    inplace = inplace and not (tracked and (input._is_view() or (input.is_leaf and input.requires_grad)))
    arguments = (input, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation, inplace)
    if not tracked:
        y = _run(*arguments, backward=False).y
        if y is input:  # an earlier call may have kept it for its backward pass
            torch.autograd.graph.increment_version(y)
        return y
    output: Tensor = _Fused.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _run(
    x: Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    running_mean: _Optional,
    running_var: _Optional,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    inplace: bool,
    *,
    backward: bool,
) -> calls.Forward:
    if training:
        forward = calls.train_forward(
            x,
            weight,
            bias,
            residual,
            running_mean,
            running_var,
            momentum,
            eps,
            activation,
            inplace=inplace,
            backward=backward,
        )
        if running_mean is not None and running_var is not None:  # the kernel has written into them unseen by autograd
            torch.autograd.graph.increment_version((running_mean, running_var))
        return forward
    assert running_mean is not None
    assert running_var is not None
    return calls.evaluate(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        eps,
        activation,
        inplace=inplace,
        backward=backward,
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: _Optional, bias: _Optional, residual: _Optional, *rest: Any) -> Tensor:
        forward = _run(x, weight, bias, residual, *rest, backward=True)
        s = forward.saved
        ctx.training, ctx.eps = rest[2], rest[4]
        ctx.activation, ctx.in_place, ctx.has_residual = s.activation, s.in_place, residual is not None
        ctx.set_materialize_grads(False)
        if s.in_place:
            ctx.mark_dirty(x)
        kept = residual if s.residual is not None else None
        ctx.save_for_backward(s.x if s.in_place else x, weight, bias, kept, s.bits, s.statistics, s.kept, s.slot)
        return forward.y

    @staticmethod
    def backward(ctx: Any, dy: _Optional) -> tuple[_Optional, ...]:
        if dy is None:
            return (None,) * 11
        return (*_gradients(ctx, dy), *(None,) * 7)


def _gradients(ctx: Any, dy: Tensor) -> tuple[_Optional, ...]:
    x, weight, bias, residual, bits, stored, kept, slot = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, dy, x, weight, bias, residual, bits, stored)
    saved = Saved(x, weight, bias, residual, bits, stored, kept, slot, ctx.activation, ctx.in_place)
    has_residual = ctx.has_residual and ctx.needs_input_grad[3]
    over_dy = not (has_residual and ctx.activation is None) and _unshared(dy)
    of_parameters: _Optional
    if ctx.training:
        dx, dresidual, of_parameters = calls.train_backward(dy, saved, residual=has_residual, over_dy=over_dy)
    else:
        needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        of_parameters = calls.backward_sums(dy, saved) if needed else None
        dx, dresidual = calls.backward_input(dy, saved, None, 1.0, residual=has_residual, over_dy=over_dy)
    if has_residual and dresidual is None:
        dresidual = dy
    if of_parameters is None or (weight is None and bias is None):
        return dx, None, None, dresidual
    of_bias, of_weight = of_parameters.to(calls.compute_dtype(x.dtype)).unbind()
    return dx, None if weight is None else of_weight, None if bias is None else of_bias, dresidual


def _differentiable_gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    bits: _Optional,
    stored: Tensor,
) -> tuple[_Optional, ...]:
    """Return the gradients as differentiable functions of everything, from the reference."""
    if ctx.in_place:
        raise StateError(
            "batch_norm: the input was overwritten (inplace=True), so that gradients of gradients cannot be taken. "
            "Pass inplace=False."
        )
    activation = ctx.activation
    if bits is not None:
        # A slope that is 1 here and another number there has no derivative of its own, so it may be a factor of dy;
        # then there is no activation left, and the values of the residual do not matter.
        dy = torch.where(calls.unpack_bits(bits, x), dy, LEAKY_SLOPE * dy if activation == "leaky_relu" else 0.0)
        activation = None
    if ctx.has_residual and residual is None:
        residual = dy
    if ctx.training:
        mean, rstd = statistics(x, None, ctx.eps)
    else:
        mean, rstd = stored[0], stored[2]
    transform = Transform(mean, rstd, weight, bias, residual, activation, None)
    reduced = REFERENCE.backward_reduce(dy, x, transform)
    gradients = REFERENCE.backward_input(dy, x, transform, reduced if ctx.training else None)
    of_weight = None if weight is None else reduced.sum_dy_xhat.to(weight.dtype)
    of_bias = None if bias is None else reduced.sum_dy.to(bias.dtype)
    return gradients.input, of_weight, of_bias, gradients.residual


# -- writing dx over dy ------------------------------------------------------------------------------------------------
#
# The gradient that arrives is often held by nobody but the engine: then its memory can take the result. Whether it is
# shows in four counts: references to the Python object, to the tensor, to its memory, and to the Python object of that.
# What they are when nobody else holds it depends on the versions of Python and torch, so it is measured once, on a
# gradient that is known to be. Memory that is not torch's own (numpy's, another process's) cannot be resized, and has
# holders that no count shows.

_alone: tuple[int, ...] | None = None
_measuring = threading.local()


def _unshared(dy: Tensor) -> bool:
    """Whether nobody else holds this gradient: to be called from the backward pass itself, which the counts include."""
    global _alone
    memory = dy.untyped_storage()
    of_memory = sys.getrefcount(memory), torch._C._storage_Use_Count(memory._cdata)
    counts = (sys.getrefcount(dy), dy._use_count(), *of_memory)  # type: ignore[attr-defined]
    if getattr(_measuring, "now", False):
        _alone = counts
        return False
    if _alone is None:
        if sys.gettrace() is not None or sys.getprofile() is not None:
            return False  # a debugger holds what it looks at: another time
        _measure()
    if counts != _alone or dy._is_view() or not is_dense(dy):
        return False
    return memory.resizable() and not memory.is_shared()


def _measure() -> None:
    """Run the smallest backward pass in which nobody but the engine can hold the gradient."""
    _measuring.now = True
    try:
        with torch.enable_grad():
            x = torch.zeros(2, 1, dtype=torch.float32, device="cpu", requires_grad=True)
            y = _Fused.apply(x, None, None, None, None, None, True, 0.0, 1.0, None, False)  # type: ignore[no-untyped-call]
            torch.autograd.grad((y * 2).sum(), x)
    finally:
        _measuring.now = False
