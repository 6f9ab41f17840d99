"""Writing several tensors as one: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.models.transaction import on_failure

__all__ = ["write_all"]


def write_all(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each value into its tensor, in place; if one write fails, those before it are taken back bit for bit."""
    before = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
    on_failure(lambda: _copy_all(before))
    try:
        _copy_all(changes)
    except BaseException:
        _copy_all(before)
        raise


def _copy_all(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    # what was made in inference mode can be written only there
    inference = any(tensor.is_inference() for tensor, _ in changes)
    with torch.inference_mode(inference), torch.no_grad():  # in this order: inference_mode(False) records gradients
        for tensor, value in changes:
            tensor.copy_(value.view_as(tensor))
