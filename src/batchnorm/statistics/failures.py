"""What is said when a model fails on a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from batchnorm.errors import ArgumentTypeError, BatchError, BatchNormError, NonFiniteError
from batchnorm.models.calling import Forward, call_on_batch
from batchnorm.nn.half_norms import half_norms
from batchnorm.statistics.stream import in_one_line

__all__ = ["explained"]

_CALLED = (
    "Of a tuple the first element is the input, of a dict every entry; forward=lambda model, batch: ... calls the "
    "model in another way. "
)


def explained(verb: str, error: Exception, model: Module, index: int, batch: Any, call: Forward) -> BatchNormError:
    """Return the error to raise from ``error``, which the model raised on the batch of that index."""
    where = f"{verb}: batch {index} (counting from 0)"
    if isinstance(error, NonFiniteError):
        return NonFiniteError(f"{where}: {error}. {_origin(batch)}")
    if isinstance(error, ArgumentTypeError):
        return ArgumentTypeError(f"{where}: {error}")
    # most likely a batch that the model is not called on in the usual way
    hint = _CALLED if isinstance(error, TypeError) and call is call_on_batch else ""
    return BatchError(
        f"{verb}: {type(model).__name__} failed on batch {index} (counting from 0): {in_one_line(error)} "
        f"{hint}{half_norms(model)}The model is as it was."
    )


def _origin(batch: Any) -> str:
    """Say whether values that are not finite came with the batch or were made on the way."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.is_floating_point()]
    if any(not bool(torch.isfinite(t).all()) for t in tensors):
        return "The batch itself holds such values: remove them from the data. The model is as it was."
    return "The batch is finite, so a layer before this one made them. The model is as it was."
