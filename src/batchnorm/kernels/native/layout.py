"""How a tensor lies in memory, in the three ways that the kernels know.

- *planes*: for every sample and channel, the positions lie side by side: NCHW, (N, C, L), NCDHW.
- *rows*: for every sample and position, the channels lie side by side: (N, C), channels-last.
- *narrow* planes: of few positions and many channels, 7×7 or 14×14, without gaps between the channels. A sample is taken
  as one row there.

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
    "Place",
    "View",
    "is_dense",
    "layout_of",
    "like",
    "place_of",
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


class Place(NamedTuple):
    """Where the elements of a tensor lie: its layout, and the strides of samples (or rows) and channels."""

    layout: Layout
    outer_stride: int
    channel_stride: int


def place_of(x: Tensor) -> Place | None:
    """Return where (N, C) or (N, C, *space) lies, None if it is neither planes nor rows."""
    return _place(x.shape, x.stride())


def layout_of(x: Tensor) -> Layout | None:
    """Return the layout alone."""
    place = place_of(x)
    return None if place is None else place.layout


@lru_cache(maxsize=4096)
def _place(shape: torch.Size, strides: tuple[int, ...]) -> Place | None:
    samples, channels = shape[0], shape[1]
    space = prod(shape[2:])
    if space != 1 and _dense(shape[2:], strides[2:], 1):
        narrow = space <= _NARROW and channels >= 8 * 16 // gcd(space, 16) and strides[1] == space
        return Place(Layout(NARROW if narrow else PLANES, samples, channels, space), strides[0], strides[1])
    if channels == 1 or strides[1] == 1:
        sizes, steps = (samples, *shape[2:]), (strides[0], *strides[2:])
        # the step from one row to the next is that of the innermost dimension which is not the channels
        step = next((s for size, s in zip(reversed(sizes), reversed(steps), strict=True) if size != 1), channels)
        if step >= channels and _dense(sizes, steps, step):
            return Place(Layout(ROWS, samples * space, channels, 1), step, 1)
    if space == 1 and samples > 1 and strides[0] == 1:  # (N, C), column by column: one sample of N positions
        return Place(Layout(PLANES, 1, channels, samples), 0, strides[1])
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


def view(x: Tensor | None) -> View:
    """Return what the kernels are told of a tensor."""
    if x is None:
        return NOTHING
    place = _place(x.shape, x.stride())
    assert place is not None
    return x.data_ptr(), place.outer_stride, place.channel_stride


def like(x: Tensor, model: Tensor, layout: Layout) -> Tensor:
    """Return ``x`` itself if it has the layout, else a copy of it that lies as ``model`` does."""
    return x if layout_of(x) == layout else torch.empty_like(model).copy_(x)
