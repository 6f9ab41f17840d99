"""Writing several tensors as one: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["write_all"]


def write_all(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each value into its tensor, in place; if one write fails, those before it are taken back bit for bit."""
    # what was made in inference mode can be written only there
    inference = any(tensor.is_inference() for tensor, _ in changes)
    with torch.inference_mode(inference), torch.no_grad():  # in this order: inference_mode(False) records gradients
        before = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
        try:
            for tensor, value in changes:
                tensor.copy_(value.view_as(tensor))
        except BaseException:
            for tensor, value in before:
                tensor.copy_(value)
            raise
