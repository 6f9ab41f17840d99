"""One call of the kernels: tensors in, addresses to the extension, tensors out.

Nothing here knows of autograd. Everything has been checked above; what the kernels cannot read as it lies is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.activation import ACTIVATIONS
from batchnorm.kernels.native.layout import (
    DTYPES,
    NOTHING,
    PLANES,
    ROWS,
    Layout,
    by_column,
    empty,
    is_dense,
    layout_of,
    like,
    view,
)
from batchnorm.kernels.native.library import library

__all__ = [
    "Forward",
    "Saved",
    "backward_input",
    "backward_sums",
    "compute_dtype",
    "evaluate",
    "moments",
    "normalize",
    "train_backward",
    "train_forward",
    "unpack_bits",
]

_ACTIVATIONS: dict[str | None, int] = {None: 0, **{name: 1 + i for i, name in enumerate(ACTIVATIONS)}}
_BY_BITS = ("relu", "leaky_relu", "relu6")  # slope of two values: a bit tells which
INVERTIBLE = (None, "leaky_relu")
"""Activations whose input can be told from the output to the last digits.

Sigmoid and tanh have inverses too, but where they saturate these multiply a rounding error without bound.
"""

# Fresh outputs of at least so many bytes are asked to lie on large pages; see docs/performance.md.
_HUGE = 4 << 20


@dataclass(slots=True)
class Saved:
    """What the backward pass needs of the forward pass.

    Attributes:
        x: the input; where ``in_place``, the output that has taken its place.
        weight: γ or None.
        bias: β or None.
        residual: or None; only where the slope of the activation is computed from it.
        bits: one bit an element, whether the activation passes the gradient; or None.
        statistics: mean, M2 and rstd, float64, (3, C).
        kept: in place, the input of the channels that cannot be recovered, (N, kept channels, inner); or None.
        slot: int32, (C,), where in ``kept`` a channel is, −1 for those that are not; or None.
        activation: a key of ``ACTIVATIONS``, or None.
        in_place: whether ``x`` is the output.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    bits: Tensor | None
    statistics: Tensor
    kept: Tensor | None
    slot: Tensor | None
    activation: str | None
    in_place: bool


@dataclass(slots=True)
class Forward:
    """What the forward pass gives: y, and what its backward pass needs."""

    y: Tensor
    saved: Saved


class _Running(NamedTuple):
    """Running statistics by address, and how the batch enters them; without momentum they are what normalizes."""

    eps: float
    mean: int
    variance: int
    momentum: float | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of parameters and running statistics beside data of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    if parameter is None:
        return None
    if parameter.dtype == compute_dtype(x.dtype) and parameter.is_contiguous() and not parameter.is_neg():
        return parameter
    return parameter.detach().resolve_neg().to(compute_dtype(x.dtype)).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _readable(x: Tensor) -> tuple[Tensor, Layout]:
    """Return ``x``, or a contiguous copy of it, and its layout."""
    layout = layout_of(x)
    if layout is None:
        x = x.contiguous()
        layout = layout_of(x)
        assert layout is not None
    return x, layout


def _call(
    x: Tensor, layout: Layout, weight: Tensor | None, bias: Tensor | None, activation: str | None, statistics: Tensor
) -> Any:
    """Return the extension's view of a call; it holds addresses, so the tensors must outlive it."""
    assert library is not None
    return library.Call(
        *layout[:1],
        DTYPES[x.dtype],
        *layout[1:],
        _address(weight),
        _address(bias),
        _ACTIVATIONS[activation],
        statistics.data_ptr(),
        torch.get_num_threads(),
    )


def fresh_like(x: Tensor, layout: Layout) -> Tensor:
    """Return an uninitialized tensor that lies as ``x`` does, on large pages where that saves page faults."""
    y = empty(x, layout)
    if (size := y.numel() * y.element_size()) >= _HUGE:
        assert library is not None
        library.advise_huge_pages(y.data_ptr(), size)
    return y


def _statistics(x: Tensor) -> Tensor:
    # the device is said everywhere: where none is, the user may have set another one
    return torch.empty(3, x.shape[1], dtype=torch.float64, device="cpu")


def moments(x: Tensor, eps: float = 0.0) -> Tensor:
    """Return mean, M2 and rstd of every channel, float64, (3, C)."""
    x, layout = _readable(x)
    statistics = _statistics(x)
    _call(x, layout, None, None, None, statistics).moments(view(x, layout), eps)
    return statistics


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    activation: str | None,
    *,
    inplace: bool = False,
    backward: bool = False,
) -> Forward:
    """Normalize by given statistics; arguments as for :func:`train_forward`."""
    return _forward(x, weight, bias, residual, statistics, activation, None, inplace, backward)


def evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str | None,
    *,
    inplace: bool = False,
    backward: bool = False,
) -> Forward:
    """Normalize by the running statistics; arguments as for :func:`train_forward`."""
    stored = _Running(eps, running_mean.data_ptr(), running_var.data_ptr(), None)
    return _forward(x, weight, bias, residual, _statistics(x), activation, stored, inplace, backward)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: str | None,
    *,
    inplace: bool = False,
    backward: bool = False,
) -> Forward:
    """Normalize by the batch's own statistics, and move the running ones.

    Args:
        x: what to normalize.
        weight: γ or None.
        bias: β or None.
        residual: or None.
        running_mean: contiguous, of :func:`compute_dtype`; or None.
        running_var: likewise.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        activation: or None.
        inplace: y may take the place of x.
        backward: a backward pass will follow, so that what it needs is kept.
    """
    running = _Running(eps, _address(running_mean), _address(running_var), momentum)
    return _forward(x, weight, bias, residual, _statistics(x), activation, running, inplace, backward)


def _forward(
    given: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    activation: str | None,
    running: _Running | None,
    inplace: bool,
    backward: bool,
) -> Forward:
    x, layout = _readable(given)
    weight, bias = _parameter(weight, x), _parameter(bias, x)
    call = _call(x, layout, weight, bias, activation, statistics)
    residual = None if residual is None else like(residual, x, layout)
    kept = slot = None
    in_place = inplace and x is given and is_dense(x) and not _shifted(residual, x)
    if in_place and backward:
        in_place, kept, slot = _recoverable(call, x, layout, residual, activation)
        if kept is not None:  # which narrow planes have no way to read
            layout = layout._replace(kind=PLANES)
            call = _call(x, layout, weight, bias, activation, statistics)
    y = x if in_place else fresh_like(x, layout)
    bits = None
    if backward and residual is not None and activation in _BY_BITS:
        bits = torch.empty(call.bit_words(), dtype=torch.int16, device="cpu")
    views = view(x, layout), view(residual, layout), view(y, layout), _address(bits)
    if running is not None and running.momentum is not None:
        call.train_forward(views[0], *running, *views[1:])
    else:
        if running is not None:
            call.take_stored(running.mean, running.variance, running.eps)
        call.normalize(*views)
    if residual is not None and (activation is None or bits is not None):
        residual = None  # its values do not matter to the gradients
    saved = Saved(y if in_place else x, weight, bias, residual, bits, statistics, kept, slot, activation, in_place)
    return Forward(y, saved)


def _shifted(residual: Tensor | None, x: Tensor) -> bool:
    """Whether a write to ``x`` would change values of the residual that are still to be read."""
    if residual is None or residual.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        return False
    return residual.data_ptr() != x.data_ptr() or residual.stride() != x.stride()


def _recoverable(
    call: Any, x: Tensor, layout: Layout, residual: Tensor | None, activation: str | None
) -> tuple[bool, Tensor | None, Tensor | None]:
    """Return whether y may take the place of x, and what must be kept of x for that."""
    if residual is not None or activation not in INVERTIBLE:
        return False, None, None
    marks = torch.empty(layout.channels, dtype=torch.uint8, device="cpu")
    unsafe = call.mark_unrecoverable(marks.data_ptr())
    if unsafe == 0:
        return True, None, None
    if layout.kind == ROWS or 2 * unsafe > layout.channels:
        return False, None, None
    where = marks.nonzero().reshape(-1)
    slot = torch.full((layout.channels,), -1, dtype=torch.int32, device="cpu")
    slot[where] = torch.arange(unsafe, dtype=torch.int32, device="cpu")
    planes = x.as_strided((layout.outer, layout.channels, layout.inner), (*view(x, layout)[1:], 1))
    return True, planes.index_select(1, where), slot


def unpack_bits(bits: Tensor, x: Tensor) -> Tensor:
    """Return the bits that a forward pass on ``x`` has kept as booleans of the shape of ``x``."""
    x, layout = _readable(x)
    call = _call(x, layout, None, None, None, bits)
    run, width = call.bit_run(), call.bits_per_word()
    words = bits.reshape(-1, (run + width - 1) // width, 1)
    flat = ((words >> torch.arange(width, dtype=torch.int16, device="cpu")) & 1).bool().flatten(1)[:, :run]
    if layout.kind == ROWS:
        return flat.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    if by_column(x, layout):
        flat = flat.reshape(layout.channels, layout.inner).t()
    return flat.reshape(x.shape)


class _Backward:
    """What the backward phases share: the tensors as the kernels can read them, and the call."""

    def __init__(self, dy: Tensor, saved: Saved) -> None:
        self.x, self.layout = _readable(saved.x)
        self.dy = like(dy, self.x, self.layout)
        self.copied = self.dy is not dy
        self._residual = None if saved.residual is None else like(saved.residual, self.x, self.layout)
        self._parameters = _parameter(saved.weight, self.x), _parameter(saved.bias, self.x)
        if saved.kept is not None:
            self.layout = self.layout._replace(kind=PLANES)
        self.call = _call(self.x, self.layout, *self._parameters, saved.activation, saved.statistics)
        kept = saved.kept
        self.views = (
            view(self.dy, self.layout),
            view(self.x, self.layout),
            _address(saved.bits),
            view(self._residual, self.layout),
            saved.in_place,
            NOTHING if kept is None else (kept.data_ptr(), kept.stride(0), kept.stride(1)),
            _address(saved.slot),
        )

    def sums(self) -> Tensor:
        return torch.empty(2, self.layout.channels, dtype=torch.float64, device="cpu")

    def gradients(self, saved: Saved, residual: bool, over_dy: bool) -> tuple[Tensor, Tensor | None]:
        """Return the tensors for the gradients of x and of the residual."""
        dx = self.dy if over_dy or self.copied else fresh_like(self.x, self.layout)
        return dx, fresh_like(self.x, self.layout) if residual and saved.activation is not None else None


def backward_sums(dy: Tensor, saved: Saved) -> Tensor:
    """Return Σg and Σg·x̂, float64, (2, C)."""
    b = _Backward(dy, saved)
    sums = b.sums()
    b.call.backward_reduce(*b.views, sums.data_ptr())
    return sums


def backward_input(
    dy: Tensor, saved: Saved, sums: Tensor | None, count: float, *, residual: bool, over_dy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return dx and the residual's gradient; arguments as for :func:`train_backward`.

    ``sums`` are those of :func:`backward_sums`, ``count`` their divisor; None: mean and rstd are constants.
    """
    b = _Backward(dy, saved)
    sums = None if sums is None else sums.contiguous()
    dx, dresidual = b.gradients(saved, residual, over_dy)
    b.call.backward_input(*b.views, _address(sums), count, view(dx, b.layout), view(dresidual, b.layout))
    return dx, dresidual


def train_backward(
    dy: Tensor, saved: Saved, *, residual: bool, over_dy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dx, the residual's gradient, and Σg and Σg·x̂ as float64 (2, C).

    Args:
        dy: gradient of y.
        saved: of the forward pass.
        residual: its gradient is wanted; without activation it is ``dy`` itself, and None is returned.
        over_dy: nobody else holds ``dy``, so that dx may take its place.
    """
    b = _Backward(dy, saved)
    sums = b.sums()
    dx, dresidual = b.gradients(saved, residual, over_dy)
    b.call.train_backward(*b.views, sums.data_ptr(), view(dx, b.layout), view(dresidual, b.layout))
    return dx, dresidual, sums
