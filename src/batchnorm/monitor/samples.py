"""Mean and variance of each sample by itself, in each channel: what a stream is summed up from."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.native import calls
from batchnorm.kernels.native.layout import DTYPES
from batchnorm.kernels.native.library import library
from batchnorm.kernels.plain import is_plain
from batchnorm.models.float64 import float64_device
from batchnorm.moments import expand_mask
from batchnorm.monitor.positions import parts, rows_in_place
from batchnorm.observers import transformed

__all__ = ["sample_statistics", "samples_in"]


def sample_statistics(
    x: Tensor,
    mask: Tensor | None = None,
    samples: int | None = None,
    first: int = 0,
    into: Tensor | None = None,
) -> Tensor:
    """Return means and biased variances of each sample in each channel: float64, shape (2, N, C).

    About each sample's own mean or a value near it, so that a mean far above the spread costs no digits. A variance of
    single values is 0. Of large feature maps a part of the positions is looked at (see
    :mod:`batchnorm.monitor.positions`).

    Args:
        x: (N, C) or (N, C, *space), floating point, not empty.
        mask: True where a position counts; samples without such a position are left out.
        samples: how many samples the rows of ``x`` stem from, if fewer than rows: a model may fold time steps or boxes
            into the first dimension, sample by sample, and rows of one sample are no more independent than positions.
        first: number of the first row in the stream.
        into: takes the result, (2, N, C), where it is known how many samples there are; anywhere, rows in one piece.
    """
    rows = x.shape[0]
    groups = samples_in(rows, samples)
    if groups == rows and mask is None and x.dim() > 2 and _kernels_read(x):
        lying = rows_in_place(x.shape, x.stride())
        if lying is not None:
            return calls.moments_of_samples(x, lying, first, into)
    x = x.detach()
    if mask is not None:
        found = _masked(x, mask, groups)
    else:
        found = _by_groups(_of_vectors(x) if x.dim() == 2 else _over_positions(x, first), groups)
    return found if into is None else into.copy_(found)


def _of_vectors(x: Tensor) -> Tensor:
    mean = x.to(float64_device(x.device)).double()
    return torch.stack((mean, torch.zeros_like(mean)))


def _by_groups(found: Tensor, groups: int) -> Tensor:
    """Return means and variances of so many samples, each of several rows."""
    _, rows, channels = found.shape
    if groups == rows:
        return found
    mean, variance = found.reshape(2, groups, rows // groups, channels)
    center = mean.mean(1)
    return torch.stack((center, variance.mean(1) + (mean - center[:, None]).square().mean(1)))


@lru_cache(maxsize=4096)
def samples_in(rows: int, samples: int | None) -> int:
    """Return how many samples so many rows of an input make, where the model was given so many."""
    return samples if samples and rows > samples and rows % samples == 0 else rows


def _over_positions(x: Tensor, first: int) -> Tensor:
    """Return means and biased variances of each (sample, channel) over the positions that are looked at."""
    return torch.cat([_moments(part) for part in parts(x, first)], 1)


def _moments(x: Tensor) -> Tensor:
    """Return means and biased variances of each (sample, channel), float64, of any strides."""
    rows, channels = x.shape[:2]
    if _kernels_read(x):
        flat = x.reshape(rows, channels, -1)
        if flat.stride(2) != 1:
            flat = flat.contiguous()
        size = flat.shape[2]
        return calls.moments_of_samples(flat, (rows, channels, 1, size, flat.stride(0), flat.stride(1), size, 1), 0)
    home = float64_device(x.device)
    if x.dtype.itemsize < 4:
        x = x.float()
    dims = tuple(range(2, x.dim()))
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square_().mean(dims)
    return torch.stack((mean.reshape(rows, channels), variance)).to(home).double()


def _kernels_read(x: Tensor) -> bool:
    """Whether the native kernels read this tensor, which is an ordinary one."""
    return library is not None and is_plain(x) and x.dtype in DTYPES and not transformed()


def _masked(x: Tensor, mask: Tensor, groups: int) -> Tensor:
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
    return torch.stack([t.reshape(groups, channels)[seen] for t in (mean, variance)]).to(home).double()
