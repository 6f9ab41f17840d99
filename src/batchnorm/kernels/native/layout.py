"""How a tensor lies in memory, in the three ways that the kernels know.

- *planes*: for every sample and channel, the positions lie side by side: NCHW, (N, C, L), NCDHW.
- *rows*: for every sample and position, the channels lie side by side: (N, C), channels-last.
- *narrow* planes: of few positions and many channels, 7×7 or 14×14, without gaps between the channels. There a sample
  is taken as one row.

The first two may have gaps between planes or rows, as slices along the batch or the channels do.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "NARROW",
    "NOTHING",
    "PLANES",
    "ROWS",
    "Layout",
    "View",
    "by_column",
    "empty",
    "is_dense",
    "layout_of",
    "like",
    "steps",
    "view",
]

PLANES, ROWS, NARROW = 0, 1, 2

# Up to so many positions a plane is narrow, if there are at least 8 groups of channels whose planes fill whole packs of
# 16 values: enough for a few threads.
_NARROW = 256

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

View: TypeAlias = tuple[int, int, int]
"""Address, and the strides of samples (or rows) and channels, in elements."""

NOTHING: View = (0, 0, 0)


class Layout(NamedTuple):
    """Planes, narrow or not, of shape (outer, channels, inner), or rows of shape (outer, channels) with inner = 1."""

    kind: int
    outer: int
    channels: int
    inner: int


def layout_of(x: Tensor) -> Layout | None:
    """Return the layout of (N, C) or (N, C, *space), None if it is neither planes nor rows."""
    return _layout(x.shape, x.stride())


@lru_cache(maxsize=4096)
def _layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout | None:
    samples, channels = shape[0], shape[1]
    space = prod(shape[2:])
    if space != 1 and _dense(shape[2:], strides[2:], 1):
        narrow = space <= _NARROW and channels >= 8 * 16 // gcd(space, 16) and strides[1] == space
        return Layout(NARROW if narrow else PLANES, samples, channels, space)
    if channels == 1 or strides[1] == 1:
        sizes, steps = (samples, *shape[2:]), (strides[0], *strides[2:])
        step = _row_stride(shape, strides)
        if step >= channels and _dense(sizes, steps, step):
            return Layout(ROWS, samples * space, channels, 1)
    if space == 1 and samples > 1 and strides[0] == 1:  # (N, C), column by column: one sample of N positions
        return Layout(PLANES, 1, channels, samples)
    return None


def _dense(sizes: tuple[int, ...], strides: tuple[int, ...], innermost: int) -> bool:
    """Whether the dimensions follow each other without gaps, the last one with the stride ``innermost``."""
    expected = innermost
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_dense(x: Tensor) -> bool:
    """Whether every element has a place of its own, without gaps: memory that a result of that shape may take over."""
    if x.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def view(x: Tensor | None, layout: Layout) -> View:
    """Return what the kernels are told of a tensor of that layout."""
    if x is None:
        return NOTHING
    return x.data_ptr(), *_strides(x.shape, x.stride(), layout)


def steps(x: Tensor, layout: Layout) -> tuple[int, int]:
    """Return what the kernels are told of the strides of a tensor of that layout, with or without data."""
    return _strides(x.shape, x.stride(), layout)


@lru_cache(maxsize=4096)
def _strides(shape: torch.Size, strides: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    if layout.kind == ROWS:
        return _row_stride(shape, strides), 1
    columns = layout.outer == 1 and shape[0] != 1
    return 0 if columns else strides[0], strides[1]


def by_column(x: Tensor, layout: Layout) -> bool:
    """Whether the layout is that of (N, C), column by column: planes of one sample with N positions."""
    return layout.kind != ROWS and layout.outer == 1 and x.shape[0] != 1


def _row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the step from one row to the next: that of the innermost dimension which is not the channels."""
    for dim in (*range(len(shape) - 1, 1, -1), 0):
        if shape[dim] != 1:
            stride: int = strides[dim]
            return stride
    channels: int = shape[1]
    return channels


def empty(model: Tensor, layout: Layout) -> Tensor:
    """Return an uninitialized tensor that lies as ``model`` does, or without gaps in the same layout."""
    y = torch.empty_like(model)
    if model.is_contiguous() or layout_of(y) == layout:
        return y
    # Of a tensor that overlaps itself, as sliding windows do, empty_like() may put the dimensions in another order.
    samples, channels, *space = model.shape
    if layout.kind == ROWS:
        return torch.empty(samples, *space, channels, dtype=model.dtype, device="cpu").movedim(-1, 1)
    if by_column(model, layout):
        return torch.empty(channels, samples, dtype=model.dtype, device="cpu").t().view(model.shape)
    return torch.empty(model.shape, dtype=model.dtype, device="cpu")


def like(x: Tensor, model: Tensor, layout: Layout) -> Tensor:
    """Return ``x`` itself if it has the layout, else a copy of it that lies as ``model`` does."""
    return x if layout_of(x) == layout and not x.is_neg() else empty(model, layout).copy_(x)
