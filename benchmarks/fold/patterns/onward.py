"""Norms with nothing before them that could absorb them: what comes after has to."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.fold.patterns.around import shuffle
from benchmarks.fold.patterns.pattern import Wired, lively, noise, pattern, positive, unshifted
from torch import Tensor, nn
from torch.nn import functional as F

FAMILY = "absorbed by what comes after"
IMAGES = noise(2, 4, 8, 8)


def _identity(x: Tensor) -> Tensor:
    return x


def _before(
    name: str, host: Any, between: Any = _identity, least: int = 0, tune: Any = _identity, norm: Any = nn.BatchNorm2d
) -> None:
    @pattern(FAMILY, name, IMAGES, least)
    def make() -> nn.Module:
        return tune(lively(Wired(lambda m, x: m.host(between(m.bn(x))), bn=norm(4), host=host())))


def _conv(**options: Any) -> Any:
    return lambda: nn.Conv2d(4, 6, 3, **options)


_before("bn → conv, no padding", _conv())
_before("bn → conv, zero padding", _conv(padding=1), least=1)
_before("bn without shift → conv, zero padding", _conv(padding=1), tune=unshifted)
_before("bn → conv, reflect padding", _conv(padding=1, padding_mode="reflect"))
_before("bn → conv, circular padding", _conv(padding=1, padding_mode="circular"))
_before("bn → grouped conv", _conv(groups=2))
_before("bn → transposed conv", lambda: nn.ConvTranspose2d(4, 6, 3), least=1)
_before("bn without shift → transposed conv", lambda: nn.ConvTranspose2d(4, 6, 3), tune=unshifted)
_before("bn → relu → conv", _conv(), F.relu, least=1)
_before("bn without shift → relu → conv, γ > 0", _conv(), F.relu, tune=lambda m: unshifted(positive(m)))
_before("bn → flatten → linear", lambda: nn.Linear(4 * 64, 5), lambda x: x.flatten(1))
_before("bn → global average pool → linear", lambda: nn.Linear(4, 5), lambda x: x.mean((2, 3)))
_before("bn → average pool, padded → conv", _conv(), lambda x: F.avg_pool2d(x, 3, 1, 1), least=1)
_before("bn → max pool → conv", _conv(), lambda x: F.max_pool2d(x, 2), least=1)
_before("bn → max pool → conv, γ > 0", _conv(), lambda x: F.max_pool2d(x, 2), tune=positive)
_before("bn → bilinear upsampling → conv", _conv(), lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"))
_before("bn → channel shuffle → conv", _conv(), shuffle)
_before("bn → dropout → conv", _conv(), lambda x: F.dropout(x, 0.5, training=False))
_before("bn → permute → linear", lambda: nn.Linear(4, 5), lambda x: x.permute(0, 2, 3, 1))
_before("bn → bn → conv", _conv(), norm=lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.BatchNorm2d(c)))


@pattern(FAMILY, "bn → linear", noise(6, 4))
def rows() -> nn.Module:
    return lively(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5)))


@pattern(FAMILY, "bn on (N, L, C) → linear", noise(2, 5, 3), least=1)
def sequence() -> nn.Module:
    return lively(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(3, 5)))


@pattern(FAMILY, "conv → relu → bn → conv, no padding", IMAGES)
def after_relu() -> nn.Module:
    return lively(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)))


@pattern(FAMILY, "bn → two convs", IMAGES)
def two_readers() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x)
        return torch.cat([m.a(y), m.b(y)], 1)

    return lively(Wired(wiring, bn=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3)))


@pattern(FAMILY, "bn → chunk → convs", IMAGES)
def chunks() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        a, b = m.bn(x).chunk(2, 1)
        return m.a(a) + m.b(b)

    return lively(Wired(wiring, bn=nn.BatchNorm2d(4), a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(2, 4, 3)))


@pattern(FAMILY, "bn whose output is returned", IMAGES, least=1)
def last() -> nn.Module:
    return lively(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
