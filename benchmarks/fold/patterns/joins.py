"""Sums and concatenations, before the norm and after it."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.fold.patterns.pattern import Wired, lively, noise, pattern, positive
from torch import Tensor, nn
from torch.nn import functional as F

FAMILY = "sums and concatenations"
IMAGES = noise(2, 4, 7, 7)


def _conv(out: int = 4) -> nn.Conv2d:
    return nn.Conv2d(4, out, 3, padding=1)


@pattern(FAMILY, "conv + conv → bn", IMAGES)
def added() -> nn.Module:
    return lively(Wired(lambda m, x: m.bn(m.a(x) + m.b(x)), a=_conv(), b=_conv(), bn=nn.BatchNorm2d(4)))


@pattern(FAMILY, "conv + the input → bn", IMAGES, least=1)
def added_input() -> nn.Module:
    return lively(Wired(lambda m, x: m.bn(m.a(x) + x), a=_conv(), bn=nn.BatchNorm2d(4)))


@pattern(FAMILY, "conv + the input → bn → relu → conv, γ > 0", IMAGES)
def split_at_the_sum() -> nn.Module:
    wiring = lambda m, x: m.b(F.relu(m.bn(m.a(x) + x)))  # noqa: E731
    return positive(lively(Wired(wiring, a=_conv(), bn=nn.BatchNorm2d(4), b=_conv())))


@pattern(FAMILY, "concat of two convs → bn", IMAGES)
def joined() -> nn.Module:
    wiring = lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1))  # noqa: E731
    return lively(Wired(wiring, a=_conv(2), b=_conv(), bn=nn.BatchNorm2d(6)))


@pattern(FAMILY, "concat of a conv and the input → bn", IMAGES, least=1)
def joined_input() -> nn.Module:
    return lively(Wired(lambda m, x: m.bn(torch.cat([m.a(x), x], 1)), a=_conv(), bn=nn.BatchNorm2d(8)))


@pattern(FAMILY, "two norms of the input → concat → 1×1 conv", IMAGES)
def joined_norms() -> nn.Module:
    wiring = lambda m, x: m.conv(torch.cat([m.bn1(x), m.bn2(x.tanh())], 1))  # noqa: E731
    return lively(Wired(wiring, bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4), conv=nn.Conv2d(8, 4, 1)))


@pattern(FAMILY, "dense block: concat → bn → relu → conv, twice, γ > 0", IMAGES, least=1)
def dense() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.a(F.relu(m.bn1(x)))
        return m.b(F.relu(m.bn2(torch.cat([x, y], 1))))

    modules = {"stem": _conv(), "bn1": nn.BatchNorm2d(4), "a": _conv(), "bn2": nn.BatchNorm2d(8)}
    return positive(lively(Wired(wiring, **modules, b=nn.Conv2d(8, 4, 1))))


@pattern(FAMILY, "three branches: relu(conv → bn + 1×1 conv → bn + bn)", IMAGES)
def three_branches() -> nn.Module:
    wiring = lambda m, x: F.relu(m.bn3(m.c3(x)) + m.bn1(m.c1(x)) + m.bn0(x))  # noqa: E731
    norms = {name: nn.BatchNorm2d(4) for name in ("bn3", "bn1", "bn0")}
    return lively(Wired(wiring, c3=_conv(), c1=nn.Conv2d(4, 4, 1), **norms))


@pattern(FAMILY, "x + γ (depthwise conv → bn − bn)", IMAGES)
def mixer() -> nn.Module:
    wiring = lambda m, x: x + 0.5 * (m.bn1(m.conv(x)) - m.bn0(x))  # noqa: E731
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    return lively(Wired(wiring, conv=depthwise, bn1=nn.BatchNorm2d(4), bn0=nn.BatchNorm2d(4)))
