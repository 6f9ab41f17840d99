"""The activations that can be fused behind a normalization: one table, name → function and derivative.

``"leaky_relu"`` has the slope 0.01 below zero; ``"leaky_relu(0.2)"`` is the one with the slope 0.2, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "activation_called", "leaky_relu", "slope_below_zero"]


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative.

    Both are made of differentiable torch operators, so that second derivatives follow. At a kink the derivative is the
    one that torch's own backward takes.

    Attributes:
        function: z → f(z), any shape.
        derivative: z → f′(z), same shape.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


_SLOPE = 0.01


def _relu(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _leaky(slope: float) -> Activation:
    def derivative(z: Tensor) -> Tensor:
        # ones_like, not 1.0: of two Python numbers where() would make float32, and 0.01 is not the same there
        return torch.where(z > 0, torch.ones_like(z), slope)

    return Activation(lambda z: F.leaky_relu(z, slope), derivative)


def _relu6(z: Tensor) -> Tensor:
    return ((z > 0) & (z < 6)).to(z.dtype)


def _hardswish(z: Tensor) -> Tensor:
    return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0))


def _silu(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _sigmoid(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _tanh(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


def _gelu(z: Tensor) -> Tensor:
    # Φ(z) + z·φ(z), with the normal distribution function Φ and its density φ
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, _relu),
    "leaky_relu": _leaky(_SLOPE),
    "relu6": Activation(F.relu6, _relu6),
    "hardswish": Activation(F.hardswish, _hardswish),
    "silu": Activation(F.silu, _silu),
    "sigmoid": Activation(torch.sigmoid, _sigmoid),
    "tanh": Activation(torch.tanh, _tanh),
    "gelu": Activation(F.gelu, _gelu),  # the exact one, with erf
}


def leaky_relu(slope: float) -> str:
    """Return the name of the leaky ReLU with this slope below zero.

    >>> leaky_relu(0.01), leaky_relu(0.2)
    ('leaky_relu', 'leaky_relu(0.2)')
    """
    return "leaky_relu" if slope == _SLOPE else f"leaky_relu({float(slope)!r})"


def slope_below_zero(name: str | None) -> float | None:
    """Return the slope below zero that the name of a leaky ReLU says; None if it is no such name.

    >>> slope_below_zero("leaky_relu"), slope_below_zero("leaky_relu(0.2)"), slope_below_zero("relu")
    (0.01, 0.2, None)
    """
    if name == "leaky_relu":
        return _SLOPE
    if name is None or not name.startswith("leaky_relu(") or not name.endswith(")"):
        return None
    try:
        slope = float(name[len("leaky_relu(") : -1])
    except ValueError:
        return None
    return slope if math.isfinite(slope) else None


def activation_called(name: str) -> Activation | None:
    """Return the activation of this name, one of ``ACTIVATIONS`` or a leaky ReLU with its slope; None if none is."""
    found = ACTIVATIONS.get(name)
    if found is not None:
        return found
    slope = slope_below_zero(name)
    return None if slope is None else _leaky(slope)
