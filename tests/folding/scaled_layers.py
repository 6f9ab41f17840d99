"""Layers of each kind that absorbs a scale for each output channel, and norms that are such scales."""

from __future__ import annotations

import torch
from torch import nn


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(kind, gammas):
    """A norm that is a scale per channel, to float32's precision."""
    norm = kind(len(gammas), eps=0.0)
    norm.weight.data.copy_(torch.tensor(gammas))
    return norm


def layer_of(make, dtype, seed=0):
    """A layer whose weights are about 0.1 to 1: normal numbers in each type."""
    torch.manual_seed(seed)
    layer = make()
    layer.weight.data.uniform_(0.1, 1).mul_(torch.randn_like(layer.weight).sign())
    return layer.to(dtype)


CONV = (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 6), nn.BatchNorm2d)
HOSTS = {
    "conv2d": CONV,
    "conv1d in groups": (lambda: nn.Conv1d(4, 4, 3, groups=2), (2, 4, 9), nn.BatchNorm1d),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6), nn.BatchNorm2d),
    "linear": (lambda: nn.Linear(5, 4), (6, 5), nn.BatchNorm1d),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5), nn.BatchNorm2d),
    "transposed in groups": (lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), (2, 6, 5), nn.BatchNorm1d),
}
