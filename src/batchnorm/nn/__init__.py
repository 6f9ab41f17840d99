"""Layers, and what is done to those of a model: their classes exchanged, and freezing."""

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
