"""The kernels as operators of torch, ``batchnorm::native_…``: functional, and with shapes for tensors without data.

Compilers capture these; calls on plain tensors go straight to :mod:`~batchnorm.kernels.native.calls`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from batchnorm.kernels.native import calls
from batchnorm.kernels.native.calls import Saved

__all__ = ["backward_input", "backward_reduce", "moments", "normalize", "train_backward", "train_forward"]

_Optional: TypeAlias = Tensor | None

_library = torch.library.Library("batchnorm", "FRAGMENT")
_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"
_BACKWARD = f"Tensor dy, Tensor x, {_AFFINE}, Tensor statistics, str? activation"


def _operator(name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one operator, and return it."""
    name = f"native_{name}"
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, real, "CPU")
    torch.library.register_fake(f"batchnorm::{name}", fake, lib=_library)
    return getattr(torch.ops.batchnorm, name).default


def _per_channel(x: Tensor, rows: int) -> Tensor:
    return x.new_empty((rows, x.shape[1]), dtype=torch.float64)


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _placed(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y`` with the strides that compilers count on, of ``empty_like(x)``: where x was copied they differ."""
    if x.is_contiguous() or y.stride() == (promised := torch.empty_like(x)).stride():
        return y
    return promised.copy_(y)


moments = _operator("moments", "(Tensor x, float eps) -> Tensor", calls.moments, lambda x, eps: _per_channel(x, 3))


def _normalize(
    x: Tensor, weight: _Optional, bias: _Optional, residual: _Optional, statistics: Tensor, activation: str | None
) -> Tensor:
    y, _ = calls.normalize(x, weight, bias, residual, statistics, activation)
    return _placed(y, x)


normalize = _operator(
    "normalize",
    f"(Tensor x, {_AFFINE}, Tensor statistics, str? activation) -> Tensor",
    _normalize,
    lambda x, *_: torch.empty_like(x),
)


def _train_forward(
    x: Tensor, weight: _Optional, bias: _Optional, residual: _Optional, eps: float, activation: str | None
) -> tuple[Tensor, Tensor]:
    y, saved = calls.train_forward(x, weight, bias, residual, eps, activation)
    return _placed(y, x), saved.statistics


train_forward = _operator(
    "train_forward",
    f"(Tensor x, {_AFFINE}, float eps, str? activation) -> (Tensor, Tensor)",
    _train_forward,
    lambda x, *_: (torch.empty_like(x), _per_channel(x, 3)),
)


def _saved(
    x: Tensor, weight: _Optional, bias: _Optional, residual: _Optional, statistics: Tensor, activation: str | None
) -> Saved:
    return Saved(x, weight, bias, residual, None, statistics, None, None, activation, False)


backward_reduce = _operator(
    "backward_reduce",
    f"({_BACKWARD}) -> Tensor",
    lambda dy, *forward: calls.backward_sums(dy, _saved(*forward)),
    lambda dy, x, *_: _per_channel(x, 2),
)


def _backward_input(dy: Tensor, x: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    *forward, sums, count = call
    saved = _saved(x, *forward)
    dx, dresidual = calls.backward_input(dy, saved, sums, count, residual=saved.residual is not None)
    return _placed(dx, x), _nothing(x) if dresidual is None else _placed(dresidual, x)


def _fake_gradients(x: Tensor, residual: _Optional, activation: str | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _nothing(x) if residual is None or activation is None else torch.empty_like(x)


backward_input = _operator(
    "backward_input",
    f"({_BACKWARD}, Tensor? sums, float count) -> (Tensor, Tensor)",
    _backward_input,
    lambda dy, x, w, b, residual, statistics, activation, *_: _fake_gradients(x, residual, activation),
)


def _train_backward(dy: Tensor, x: Tensor, *forward: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved = _saved(x, *forward)
    dx, dresidual, sums = calls.train_backward(dy, saved, residual=saved.residual is not None)
    return _placed(dx, x), _nothing(x) if dresidual is None else _placed(dresidual, x), sums


train_backward = _operator(
    "train_backward",
    f"({_BACKWARD}) -> (Tensor, Tensor, Tensor)",
    _train_backward,
    lambda dy, x, w, b, residual, statistics, activation: (
        *_fake_gradients(x, residual, activation),
        _per_channel(x, 2),
    ),
)
