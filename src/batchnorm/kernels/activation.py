"""The activations that can be fused behind a normalization: one table, name → function and derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "LEAKY_SLOPE", "Activation"]


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


LEAKY_SLOPE = 0.01
"""Slope of ``leaky_relu`` below zero."""


def _relu(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _leaky_relu(z: Tensor) -> Tensor:
    # ones_like, not 1.0: of two Python numbers where() would make float32, and 0.01 is not the same there
    return torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE)


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
    "leaky_relu": Activation(F.leaky_relu, _leaky_relu),
    "relu6": Activation(F.relu6, _relu6),
    "hardswish": Activation(F.hardswish, _hardswish),
    "silu": Activation(F.silu, _silu),
    "sigmoid": Activation(torch.sigmoid, _sigmoid),
    "tanh": Activation(torch.tanh, _tanh),
    "gelu": Activation(F.gelu, _gelu),  # the exact one, with erf
}
