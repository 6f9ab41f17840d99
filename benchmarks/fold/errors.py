"""How far outputs are from what they should be, and when that is no rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["ROUNDINGS", "WRONG", "largest_error"]

WRONG = 1e-3  # relative to the largest output: rounding is far below it, a wrong fold far above
ROUNDINGS = 10  # and so many times what rounding moves the original itself: deep networks in float32 come near WRONG


def largest_error(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the largest difference of an output, relative to its largest value; infinite if outputs are lacking."""
    if [a.shape for a in expected] != [b.shape for b in got]:
        return float("inf")
    return max(_relative(a.double(), b.double()) for a, b in zip(expected, got, strict=True))


def _relative(a: Tensor, b: Tensor) -> float:
    error = float((a - b).abs().max() / a.abs().max())
    return float("inf") if math.isnan(error) else error
