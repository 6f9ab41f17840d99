"""What proofs in float64 are made of: tensors brought to float64, and the growth of rounding errors there."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["float64_device", "float64_gamma", "to_float64"]


def float64_gamma(n: int) -> float:
    """Return γ_n = n·v/(1 − n·v) for float64, v = 2⁻⁵³ (Higham §3.1).

    >>> float64_gamma(1) == 2**-53 / (1 - 2**-53)
    True
    """
    v = torch.finfo(torch.float64).eps / 2
    return n * v / (1 - n * v)


def float64_device(device: torch.device) -> torch.device:
    """Return where float64 is kept for tensors of a device: there, or on the CPU where it has none (Apple's GPUs)."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(tensor: Tensor) -> Tensor:
    """Return the values in float64, without history, on :func:`float64_device`."""
    return tensor.detach().to(float64_device(tensor.device)).double()
