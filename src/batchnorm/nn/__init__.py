"""Layers, and what is done to those of a model: their classes exchanged, their norms frozen or redirected for a block.

::

    input ── batch_norm: the layer ── functional.normalize ── output
                  └── fused: pending, a tensor that waits for the activation behind it
    model ── select: which modules are norms ── swap, freeze, redirect
"""

from batchnorm.nn import other_tools as other_tools  # answers whoever reads a norm's eps or asks for its class
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.freeze import FreezeResult, freeze, is_frozen, unfreeze

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FreezeResult",
    "freeze",
    "is_frozen",
    "unfreeze",
]
