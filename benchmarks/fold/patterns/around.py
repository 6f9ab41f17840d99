"""Operators between a convolution and the norm behind it."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.fold.patterns.pattern import Wired, lively, noise, pattern, positive
from torch import Tensor, nn
from torch.nn import functional as F

FAMILY = "operators between the convolution and the norm"
IMAGES = noise(2, 3, 8, 8)


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Interleave the channels of groups, as ShuffleNet does."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _between(name: str, between: Any, least: int = 0, channels: int = 4, positive_scale: bool = False) -> None:
    @pattern(FAMILY, name, IMAGES, least)
    def make() -> nn.Module:
        wiring = lambda m, x: m.bn(between(m.conv(x)))  # noqa: E731
        model = lively(Wired(wiring, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(channels)))
        return positive(model) if positive_scale else model


_between("conv → dropout → bn", lambda x: F.dropout(x, 0.5, training=False))
_between("conv → average pool → bn", lambda x: F.avg_pool2d(x, 2))
_between("conv → average pool, padded → bn", lambda x: F.avg_pool2d(x, 3, 1, 1), least=1)
_between("conv → max pool → bn", lambda x: F.max_pool2d(x, 2), least=1)
_between("conv → max pool → bn, γ > 0", lambda x: F.max_pool2d(x, 2), positive_scale=True)
_between("conv → nearest upsampling → bn", lambda x: F.interpolate(x, scale_factor=2.0))
_between("conv → bilinear upsampling → bn", lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"))
_between("conv → channel shuffle → bn", shuffle)
_between("conv → slice → bn", lambda x: x[:, 1:], channels=3)
_between("conv → spatial flip and crop → bn", lambda x: x.flip(2)[:, :, 1:4])
_between("conv → pixel shuffle → bn", lambda x: F.pixel_shuffle(x, 2), channels=1)
_between("conv → zero padding → bn", lambda x: F.pad(x, (1, 1, 1, 1)), least=1)
_between("conv → times a number → bn", lambda x: x * 0.5)
_between("conv → relu → bn", F.relu, least=1)
_between("conv → global pool → bn", lambda x: x.mean((2, 3), keepdim=True))


@pattern(FAMILY, "conv → global pool → flatten → bn1d", IMAGES)
def head() -> nn.Module:
    wiring = lambda m, x: m.bn(torch.flatten(m.pool(m.conv(x)), 1))  # noqa: E731
    return lively(Wired(wiring, conv=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d(1), bn=nn.BatchNorm1d(4)))


@pattern(FAMILY, "conv → flatten → bn1d of every position", IMAGES, least=1)
def positions() -> nn.Module:
    return lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 36)))


@pattern(FAMILY, "conv → chunk → a norm each", IMAGES)
def chunks() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        a, b = m.conv(x).chunk(2, 1)
        return torch.cat([m.bn1(a).tanh(), m.bn2(b)], 1)

    return lively(Wired(wiring, conv=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(2), bn2=nn.BatchNorm2d(2)))


@pattern(FAMILY, "conv → bn → bn", IMAGES)
def twice() -> nn.Module:
    return lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
