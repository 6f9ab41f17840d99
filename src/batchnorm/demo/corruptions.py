"""Three ways in which pictures at work come to differ from those of the training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CORRUPTIONS"]


def _noise(images: Tensor) -> Tensor:
    """Add Gaussian noise of standard deviation 0.3 and clip to the range of a picture."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 0.3 * noise).clamp(0, 1)


def _inversion(images: Tensor) -> Tensor:
    """Swap black and white."""
    return 1 - images


def _rotation(images: Tensor) -> Tensor:
    """Turn by a quarter."""
    return images.rot90(1, (-2, -1))


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise (σ = 0.3)": _noise,
    "inversion": _inversion,
    "rotation (90°)": _rotation,
}
