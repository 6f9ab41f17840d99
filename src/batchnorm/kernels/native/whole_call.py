"""Whole calls of the native kernels: one autograd node a call, running statistics and all, past torch's dispatcher.

A fast path for plain calls on the CPU, most of those in training and inference: ordinary tensors that fit together,
which nobody observes. They need neither an operator that others can see nor float64 moments as tensors, and for a small
layer those cost more than the norm itself. So do many small functions, see :mod:`batchnorm.kernels.native.calls`: all
preconditions are checked in one function, since each Python call costs measurable time.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, TypeAlias

import torch
from torch import Tensor

from batchnorm.errors import StateError
from batchnorm.kernels.activation import ACTIVATIONS, slope_below_zero
from batchnorm.kernels.contract import Candidate, Counters, Transform, WholeCall
from batchnorm.kernels.native import calls
from batchnorm.kernels.native.calls import Running, Saved
from batchnorm.kernels.native.layout import DTYPES, is_dense
from batchnorm.kernels.plain import is_counter, is_per_channel, is_plain
from batchnorm.kernels.reference import REFERENCE, statistics
from batchnorm.observers import observed

__all__ = ["WholeCalls"]

_Optional: TypeAlias = Tensor | None


class WholeCalls(Candidate):
    """The part of the backend that serves a call as a whole."""

    def serve(self, call: WholeCall, counters: Counters, forced: bool) -> _Optional:
        """Serve the call if it is plain.

        A plain call has plain tensors that fit together, nothing is left to check, and nobody observes it. Every other
        call takes the long way, where it is checked in full and errors find their words.
        """
        if observed():
            return None
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, inplace = call
        if not is_plain(x) or x.dim() < 2 or x.dtype not in DTYPES:
            return None
        if activation is not None and not _is_known(activation):
            return None
        if residual is not None and not (
            is_plain(residual) and residual.shape == x.shape and residual.dtype is x.dtype
        ):
            return None
        if not isinstance(eps, float | int) or not isinstance(momentum, float | int):
            return None
        channels, size = x.shape[1], x.numel()
        if training:
            fits = (running_mean is None) == (running_var is None) and size > channels and eps > 0
        else:
            fits = running_mean is not None and running_var is not None and size > 0 and eps >= 0
        if not fits:
            return None
        wanted = calls.compute_dtype(x.dtype)
        tracked = x.requires_grad or (residual is not None and residual.requires_grad)
        for parameter in (weight, bias):
            if parameter is not None:
                if not is_per_channel(parameter, wanted, channels):
                    return None
                tracked = tracked or parameter.requires_grad
        for statistic in (running_mean, running_var):
            if statistic is not None and (statistic.requires_grad or not is_per_channel(statistic, wanted, channels)):
                return None
        if training and not (is_counter(counters.batches) and is_counter(counters.refused)):
            return None
        running = Running(running_mean, running_var, momentum if training else None, *counters[:2])
        if tracked and torch.is_grad_enabled():
            # autograd forbids to write over these
            inplace = inplace and not x._is_view() and not (x.is_leaf and x.requires_grad)
            options = (activation, eps, running, inplace)
            output: Tensor = _Fused.apply(x, weight, bias, residual, options)  # type: ignore[no-untyped-call]
            return output
        y, _ = calls.forward(x, weight, bias, residual, activation, eps, running, inplace=inplace)
        _count_writes(running, x if y is x else None)
        return y


def _is_known(activation: object) -> bool:
    return type(activation) is str and (activation in ACTIVATIONS or slope_below_zero(activation) is not None)


def _count_writes(running: Running, x: _Optional) -> None:
    """Tell autograd what the kernels have written unseen: an earlier call may have kept it for its backward pass."""
    written = [] if x is None else [x]
    if running.momentum is not None and running.mean is not None and running.var is not None:
        written += running.mean, running.var
    if running.momentum is not None and running.batches is not None:
        written.append(running.batches)
    if written:
        torch.autograd.graph.increment_version(written)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: _Optional,
        bias: _Optional,
        residual: _Optional,
        options: tuple[str | None, float, Running, bool],
    ) -> Tensor:
        activation, eps, running, inplace = options
        y, saved = calls.forward(x, weight, bias, residual, activation, eps, running, inplace=inplace, backward=True)
        _count_writes(running, None)
        in_place = saved.in_place
        ctx.about = (activation, in_place, running.momentum is not None, eps, residual is not None)
        ctx.set_materialize_grads(False)
        if in_place:
            ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias, saved.residual, saved.bits, saved.statistics, saved.kept, saved.slot)
        return y

    @staticmethod
    def backward(ctx: Any, dy: _Optional) -> tuple[_Optional, ...]:
        if dy is None:
            return None, None, None, None, None
        return *_gradients(ctx, dy), None


def _gradients(ctx: Any, dy: Tensor) -> tuple[_Optional, ...]:
    activation, in_place, training, eps, added = ctx.about
    saved = Saved._make((*ctx.saved_tensors, activation, in_place))
    if torch.is_grad_enabled():
        return _differentiable_gradients(dy, saved, training, eps, added)
    has_residual = added and ctx.needs_input_grad[3]
    over_dy = not (has_residual and activation is None) and _unshared(dy)
    if training:
        dx, dresidual, dweight, dbias = calls.train_gradients(dy, saved, residual=has_residual, over_dy=over_dy)
    else:
        needed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dweight, dbias = _constant_gradients(dy, saved) if needed else (None, None)
        dx, dresidual = calls.backward_input(dy, saved, None, 1.0, residual=has_residual, over_dy=over_dy)
    return dx, dweight, dbias, dy if has_residual and dresidual is None else dresidual


def _constant_gradients(dy: Tensor, saved: Saved) -> tuple[_Optional, _Optional]:
    """Return the gradients of γ and β in evaluation."""
    of_bias, of_weight = calls.backward_sums(dy, saved).to(calls.compute_dtype(saved.x.dtype)).unbind()
    return None if saved.weight is None else of_weight, None if saved.bias is None else of_bias


def _differentiable_gradients(
    dy: Tensor, saved: Saved, training: bool, eps: float, added: bool
) -> tuple[_Optional, ...]:
    """Return the gradients as differentiable functions of everything, from the reference."""
    x, weight, bias, residual, bits, stored, _, _, activation, in_place = saved
    if in_place:
        raise StateError(
            "batch_norm: the input was overwritten (inplace=True), so that gradients of gradients cannot be taken. "
            "Pass inplace=False."
        )
    if bits is not None:
        # A slope that is 1 here and another number there has no derivative of its own, so it may be a factor of dy;
        # then there is no activation left, and the values of the residual do not matter.
        slope = slope_below_zero(activation)
        wide = dy.to(calls.compute_dtype(x.dtype))  # in half precision the product would be rounded, and then the sums
        given, dy = dy, torch.where(calls.unpack_bits(bits, x), wide, 0.0 if slope is None else slope * wide)
        activation = None
    else:
        given = dy
    if added and residual is None:
        residual = given  # for its shape and type only
    mean, rstd = statistics(x, None, eps) if training else (stored[0], stored[2])
    transform = Transform(mean, rstd, weight, bias, residual, activation, None)
    reduced = REFERENCE.backward_reduce(dy, x, transform)
    gradients = REFERENCE.backward_input(dy, x, transform, reduced if training else None)
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
            y = _Fused.apply(x, None, None, None, (None, 1.0, Running(None, None, 0.0), False))  # type: ignore[no-untyped-call]
            torch.autograd.grad((y * 2).sum(), x)
    finally:
        _measuring.now = False
