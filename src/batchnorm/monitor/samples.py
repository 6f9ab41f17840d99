"""Mean and variance of each sample by itself, in each channel: what a stream is summed up from."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.graph.rounding import float64_device
from batchnorm.kernels.native import calls
from batchnorm.kernels.native.layout import DTYPES
from batchnorm.kernels.native.library import library
from batchnorm.moments import expand_mask
from batchnorm.monitor.positions import as_rows, distance, parts

__all__ = ["sample_statistics", "samples_in"]


def sample_statistics(
    x: Tensor, mask: Tensor | None = None, samples: int | None = None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each sample in each channel: float64, shape (N, C).

    Two passes, so that a mean far above the spread costs no digits. A variance of single values is 0. Of large feature
    maps a part of the positions is looked at (see :mod:`batchnorm.monitor.positions`).

    Args:
        x: (N, C) or (N, C, *space), floating point, not empty.
        mask: True where a position counts; samples without such a position are left out.
        samples: how many samples the rows of ``x`` stem from, if fewer than rows: a model may fold time steps or boxes
            into the first dimension, sample by sample, and rows of one sample are no more independent than positions.
        first: number of the first row in the stream.
    """
    x = x.detach()
    rows, channels = x.shape[:2]
    groups = samples_in(x, samples)
    if mask is not None:
        return _masked(x, mask, groups)
    if x.dim() == 2:
        mean = x.to(float64_device(x.device)).double()
        variance = torch.zeros_like(mean)
    else:
        mean, variance = _over_positions(x, first)
    if groups == rows:
        return mean, variance
    mean, variance = (t.reshape(groups, rows // groups, channels) for t in (mean, variance))
    center = mean.mean(1)
    return center, variance.mean(1) + (mean - center[:, None]).square().mean(1)


def samples_in(x: Tensor, samples: int | None) -> int:
    """Return how many samples the rows of ``x`` make, where the model was given so many."""
    rows = x.shape[0]
    return samples if samples and rows > samples and rows % samples == 0 else rows


_SHORT = 8  # values in a row: of fewer, the kernels would read one by one


def _over_positions(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each (sample, channel) over the positions that are looked at."""
    k = distance(x.shape)
    if k > 1 and _kernels_read(x):
        rows = as_rows(x)
        height, width = rows.shape[2:]
        if rows.stride(3) == 1 and width >= _SHORT:
            mean, m2 = calls.moments_of_samples(rows, first, k)
            if height % k == 0:
                return mean, m2 / (height // k * width)
            count = [(height - (first + n) % k + k - 1) // k * width for n in range(len(x))]
            return mean, m2 / torch.tensor(count, dtype=torch.float64, device="cpu")[:, None]
    each = [_moments(part) for part in parts(x, first)]
    if len(each) == 1:
        return each[0]
    mean, variance = (torch.cat(t) for t in zip(*each, strict=True))
    return mean, variance


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each (sample, channel), float64, of any strides."""
    rows, channels = x.shape[:2]
    if _kernels_read(x):
        flat = x.reshape(1, rows * channels, -1)  # a channel of the kernel is a pair (sample, channel)
        mean, m2, _ = calls.moments(flat, planes=True)
        return mean.reshape(rows, channels), (m2 / flat.shape[2]).reshape(rows, channels)
    home = float64_device(x.device)
    if x.dtype.itemsize < 4:
        x = x.float()
    dims = tuple(range(2, x.dim()))
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square_().mean(dims)
    return mean.reshape(rows, channels).to(home).double(), variance.to(home).double()


def _kernels_read(x: Tensor) -> bool:
    """Whether the native kernels read this tensor, which is an ordinary one."""
    return (
        library is not None
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and not x.is_neg()
        and not torch._C._are_functorch_transforms_active()
    )


def _masked(x: Tensor, mask: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    home = float64_device(x.device)
    if x.dtype.itemsize < 4:
        x = x.float()
    rows, channels = x.shape[:2]
    shape = (groups, rows // groups, channels, -1)
    valid, space = expand_mask(mask, x, 1).reshape(shape), x.reshape(shape)
    count = valid.sum((1, 3), keepdim=True)
    mean = torch.where(valid, space, 0.0).sum((1, 3), keepdim=True) / count
    variance = torch.where(valid, space - mean, 0.0).square_().sum((1, 3), keepdim=True) / count
    seen = (count > 0).reshape(groups, channels).all(1)
    mean, variance = (t.reshape(groups, channels)[seen].to(home).double() for t in (mean, variance))
    return mean, variance
