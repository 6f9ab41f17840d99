"""Modules called more than once, values read more than once, and orders that mislead."""

from __future__ import annotations

from typing import Any

from benchmarks.fold.patterns.pattern import Wired, lively, noise, pattern
from torch import Tensor, nn
from torch.nn import functional as F

FAMILY = "shared modules and other readers"
IMAGES = noise(2, 4, 7, 7)


def _wired(name: str, wiring: Any, norms: int, least: int = 0, convs: int = 1) -> None:
    @pattern(FAMILY, name, IMAGES, least)
    def make() -> nn.Module:
        modules: dict[str, nn.Module] = {f"conv{i}": nn.Conv2d(4, 4, 3, padding=1) for i in range(convs)}
        return lively(Wired(wiring, **modules, **{f"bn{i}": nn.BatchNorm2d(4) for i in range(norms)}))


_wired("one conv, two norms", lambda m, x: m.bn0(m.conv0(x)) + m.bn1(m.conv0(x.tanh())), 2)
_wired("one conv → bn pair, called twice", lambda m, x: m.bn0(m.conv0(F.relu(m.bn0(m.conv0(x))))), 1)
_wired("one norm after two convs", lambda m, x: m.bn0(m.conv0(x)) + m.bn0(m.conv1(x.tanh())), 1, convs=2)
_wired("one conv, called with and without its norm", lambda m, x: m.conv0(F.relu(m.bn0(m.conv0(x)))), 1)
_wired("conv with a second reader", lambda m, x: _twice(m.conv0(x), m.bn0), 1, least=1)
_wired("conv that is returned too", lambda m, x: _both(m.conv0(x), m.bn0), 1, least=1)
_wired("two norms of one conv's output", lambda m, x: _two(m.conv0(x), m.bn0, m.bn1), 2, least=2)


def _twice(y: Tensor, norm: Any) -> Tensor:
    return norm(y) + y.tanh()


def _both(y: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    return norm(y), y


def _two(y: Tensor, first: Any, second: Any) -> Tensor:
    return F.relu(first(y)) + second(y).tanh()


@pattern(FAMILY, "conv → relu → bn, registered as conv, bn, relu", IMAGES, least=1)
def registration() -> nn.Module:
    modules = {"conv": nn.Conv2d(4, 4, 3), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU()}
    return lively(Wired(lambda m, x: m.bn(m.relu(m.conv(x))), **modules))


@pattern(FAMILY, "two pairs, norms registered the other way round", IMAGES)
def crossed_registration() -> nn.Module:
    modules = {"conv1": nn.Conv2d(4, 4, 3), "bn2": nn.BatchNorm2d(4), "conv2": nn.Conv2d(4, 4, 3)}
    wiring = lambda m, x: m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)))))  # noqa: E731
    return lively(Wired(wiring, **modules, bn1=nn.BatchNorm2d(4)))


@pattern(FAMILY, "tied weights of two convs, one with a norm", IMAGES)
def tied() -> nn.Module:
    wiring = lambda m, x: m.second(F.relu(m.bn(m.first(x))))  # noqa: E731
    model = Wired(wiring, first=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), second=nn.Conv2d(4, 4, 1))
    model.second.weight = model.first.weight  # type: ignore[union-attr]
    return lively(model)


@pattern(FAMILY, "a forward that branches on a shape", IMAGES)
def branching() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        return F.relu(y) if y.shape[0] > 1 and y.shape[2] * 2 > y.shape[1] else y

    return lively(Wired(wiring, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)))


@pattern(FAMILY, "a dict as output", IMAGES)
def dictionary() -> nn.Module:
    wiring = lambda m, x: {"features": m.bn(m.conv(x))}  # noqa: E731
    return lively(Wired(wiring, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)))


@pattern(FAMILY, "residual block: relu(conv → bn + shortcut)", IMAGES)
def residual() -> nn.Module:
    modules = {"conv": nn.Conv2d(4, 4, 3, padding=1, bias=False), "bn": nn.BatchNorm2d(4)}
    return lively(Wired(lambda m, x: F.relu(m.bn(m.conv(x)) + x), **modules))
