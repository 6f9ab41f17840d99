"""The native kernels as a backend, with the contract's split and fused phases."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.contract import Backend, Gradients, Reduced, Request, Transform
from batchnorm.kernels.native import operators
from batchnorm.kernels.native.layout import DTYPES
from batchnorm.kernels.native.library import library, missing
from batchnorm.kernels.native.whole_call import WholeCalls
from batchnorm.kernels.plain import is_ordinary
from batchnorm.moments import Moments
from batchnorm.observers import by_forward_mode, has_dispatch_modes, recorded, transformed

__all__ = ["ALWAYS", "NATIVE", "SMALLEST", "Native", "pays"]

# From how many values on the kernels pay, read off `python -m benchmarks.train_step.calibrate` (two cores of an AMD
# EPYC 7003, float32, forward and backward, torch 2.13): the sizes at which they were last slower than torch's, and
# first faster. Below, the call costs more than the norm.
#
#                         channels      last slower    first faster
#     planes              8 to 256           30,000         100,000   (1.1 to 1.3 times)
#     planes, with ReLU   8 to 1024          10,000          30,000
#     rows                8                   3,000          10,000
#     rows                64 to 1024        100,000         300,000   (1.0 to 1.1 times)
#     rows, with ReLU     8                   3,000          10,000
#     rows, with ReLU     64 to 1024         30,000         100,000   (1.0 to 1.1 times)
#
# That is with the input in the cache. In a network it comes from memory; then rows are, beside torch's layer (one
# thread, forward and backward with 64 MB touched before each, medians of 36 to 160 interleaved rounds),
#
#     8×256×14×14    400,000 values    0.79 times as fast; by torch's kernel 0.91
#     8×128×28×28    800,000           0.89; 0.93
#     16×256×14×14   800,000           0.95; 0.97
#     8×64×48×48     1,180,000         1.22; 0.98
#     32×64×24×24    1,180,000         1.02; 0.95
#     8×512×28×28    3,200,000         1.18; 0.96
#
# In evaluation (`--evaluation`) torch makes one trip through memory too:
#
#     planes              8 to 1024       4,000,000       8,000,000   (2 to 3 times: with large pages)
#     planes, with ReLU   8 to 1024         100,000         300,000
#     rows                64 to 1024        100,000         300,000
#     rows, with ReLU     64 to 1024              -          30,000
#     rows                8               4,000,000       8,000,000   (a pack is half empty)
SMALLEST = 32_768
_PLANES = 65_536
_ROWS = 1_179_648
_ROWS_FUSED = 131_072
_NARROW = 16  # channels of rows, fewer than a pack holds: torch's kernel is at its slowest there
_EVALUATION = 8_388_608
_EVALUATION_ROWS = 262_144
_EVALUATION_FUSED = 131_072
# from here on, but for planes alone and narrow rows in evaluation
ALWAYS = max(SMALLEST, _PLANES, _ROWS, _ROWS_FUSED, _EVALUATION_ROWS, _EVALUATION_FUSED)


def pays(x: Tensor, training: bool, fused: bool) -> bool:
    """Whether the kernels are faster than torch's on an input of this size and layout.

    Args:
        x: the input.
        training: normalized by its own statistics.
        fused: with an activation or a residual.
    """
    size = x.numel()
    planes = x.dim() > 2 and x.is_contiguous()
    narrow = not planes and x.dim() > 1 and x.shape[1] < _NARROW
    if not training:
        if narrow or (planes and not fused):
            return size >= _EVALUATION
        return size >= (_EVALUATION_FUSED if fused else _EVALUATION_ROWS)
    if planes:
        return size >= (SMALLEST if fused else _PLANES)
    if narrow:
        return size >= SMALLEST
    return size >= (_ROWS_FUSED if fused else _ROWS)


class Native(WholeCalls, Backend):
    """Batch normalization on the CPU, at the speed of memory."""

    name = "native"

    def refusal(self, request: Request) -> str | None:
        """Serve unmasked calls on ordinary CPU tensors of the four dtypes."""
        x = request.input
        if library is None:
            return missing
        if x.device.type != "cpu":
            return f"it runs on the CPU; the input is on {x.device}"
        if x.dtype not in DTYPES:
            return f"it has no {x.dtype}"
        if request.mask is not None:
            return "it takes no mask"
        if x.dim() < 2 or x.numel() == 0:
            return "there is nothing to normalize"
        if torch.compiler.is_compiling():
            exporting = torch.compiler.is_exporting()
            return "an exported program holds only torch's own operators" if exporting else None
        if by_forward_mode():
            return "it has no derivatives in forward mode"
        # what is no tensor at all is found out elsewhere
        tensors = (t for t in (x, request.weight, request.bias, request.residual) if isinstance(t, Tensor))
        plain = not recorded() and not transformed() and all(map(is_ordinary, tensors))
        return None if plain else "it reads ordinary tensors only"

    def prefers_not(self, request: Request) -> str | None:
        """Leave small inputs to torch, and calls that a dispatch mode looks at: it knows torch's operators."""
        fused = request.activation is not None or request.residual is not None
        if not pays(request.input, request.training, fused):
            return f"with {request.input.numel()} values the call costs more than it saves"
        return "a dispatch mode looks at the operators, and knows torch's" if has_dispatch_modes() else None

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Moments:
        """Return count, mean and M2 per channel."""
        return _moments(x, operators.moments(x, 0.0))

    def normalize(self, x: Tensor, transform: Transform) -> Tensor:
        """Return activation(weight · x̂ + bias + residual)."""
        t = transform
        y: Tensor = operators.normalize(x, t.weight, t.bias, t.residual, _statistics(t), t.activation)
        return y

    def backward_reduce(self, dy: Tensor, x: Tensor, transform: Transform) -> Reduced:
        """Return the number of values, Σg and Σg·x̂."""
        t = transform
        sums = operators.backward_reduce(dy, x, t.weight, t.bias, t.residual, _statistics(t), t.activation)
        return Reduced(_count(x), sums[0], sums[1])

    def backward_input(self, dy: Tensor, x: Tensor, transform: Transform, reduced: Reduced | None) -> Gradients:
        """Return the gradients of x and of the residual."""
        t = transform
        sums = None if reduced is None else torch.stack((reduced.sum_dy, reduced.sum_dy_xhat))
        # the divisor is the count of whoever added the sums up, of all processes perhaps, and the same in all channels
        count = 1.0 if reduced is None else float(reduced.count[0])
        dx, dresidual = operators.backward_input(
            dy, x, t.weight, t.bias, t.residual, _statistics(t), t.activation, sums, count
        )
        return Gradients(dx, _of_residual(dy, dresidual, t))

    def train_forward(self, x: Tensor, transform: Transform, eps: float) -> tuple[Tensor, Moments]:
        """Return y and the moments of x, in one trip through memory where a channel stays in the cache."""
        t = transform
        y, statistics = operators.train_forward(x, t.weight, t.bias, t.residual, eps, t.activation)
        return y, _moments(x, statistics)

    def train_backward(self, dy: Tensor, x: Tensor, transform: Transform) -> tuple[Gradients, Reduced]:
        """Return the input gradients and the two sums, likewise."""
        t = transform
        dx, dresidual, sums = operators.train_backward(
            dy, x, t.weight, t.bias, t.residual, _statistics(t), t.activation
        )
        return Gradients(dx, _of_residual(dy, dresidual, t)), Reduced(_count(x), sums[0], sums[1])


def _count(x: Tensor) -> Tensor:
    return torch.full((x.shape[1],), x.numel() // x.shape[1], dtype=torch.float64, device="cpu")


def _moments(x: Tensor, statistics: Tensor) -> Moments:
    return Moments(_count(x), statistics[0], statistics[1])


def _statistics(transform: Transform) -> Tensor:
    """Return mean, M2 (which nobody reads) and rstd as the kernels take them."""
    return torch.stack((transform.mean, transform.mean, transform.rstd))


def _of_residual(dy: Tensor, dresidual: Tensor, transform: Transform) -> Tensor | None:
    if transform.residual is None:
        return None
    return dy if transform.activation is None else dresidual


NATIVE = Native()
