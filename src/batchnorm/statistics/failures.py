"""What is said when a model fails on a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from batchnorm.errors import ArgumentTypeError, BatchError, BatchNormError, NonFiniteError
from batchnorm.nn.calling import Forward, call_on_batch
from batchnorm.nn.select import named_norms
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
        f"{hint}{_half_norms(model)}The model is as it was."
    )


def _half_norms(model: Module) -> str:
    """Name the norms in half precision inside a model that is not, which torch does not run; ``""`` without any."""
    norms = named_norms(model)
    others = {id(p) for norm in norms.values() for p in norm.parameters()}
    if not any(p.dtype == torch.float32 and id(p) not in others for p in model.parameters()):
        return ""
    half = [
        name
        for name, norm in norms.items()
        if any(t.dtype in (torch.float16, torch.bfloat16) for t in (*norm.parameters(), *norm.buffers()))
    ]
    if not half:
        return ""
    first = f"model.get_submodule({half[0]!r})" if half[0] else "model"
    return (
        f"{half[0]} holds half precision in a model of float32 ({len(half)} of {len(norms)} norms do): {first}.float() "
        "makes it fit. "
    )


def _origin(batch: Any) -> str:
    """Say whether values that are not finite came with the batch or were made on the way."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.is_floating_point()]
    if any(not bool(torch.isfinite(t).all()) for t in tensors):
        return "The batch itself holds such values: remove them from the data. The model is as it was."
    return "The batch is finite, so a layer before this one made them. The model is as it was."
