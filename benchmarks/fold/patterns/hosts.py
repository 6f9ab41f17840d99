"""An operator with weights, and a norm right after it."""

from __future__ import annotations

from typing import Any

from benchmarks.fold.patterns.pattern import Wired, lively, noise, numbers, pattern
from torch import Tensor, nn

FAMILY = "after a convolution, linear layer or table"

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _convolution(name: str, n: int = 2, **options: Any) -> None:
    @pattern(FAMILY, name, noise(2, 4, *[7] * n))
    def make() -> nn.Module:
        return lively(nn.Sequential(_CONV[n](4, 8, 3, **options), _NORM[n](8)))


def _transposed(name: str, n: int = 2, out: int = 8, **options: Any) -> None:
    @pattern(FAMILY, name, noise(2, 4, *[5] * n))
    def make() -> nn.Module:
        return lively(nn.Sequential(_TRANSPOSED[n](4, out, 3, **options), _NORM[n](out)))


_convolution("conv1d → bn", n=1)
_convolution("conv2d → bn, zero padding", padding=1)
_convolution("conv3d → bn", n=3)
_convolution("conv without bias → bn", bias=False)
_convolution('conv, padding="same", dilated → bn', padding="same", dilation=2)
_convolution("conv, strided → bn", stride=2, padding=2)
_convolution("conv, reflect padding → bn", padding=1, padding_mode="reflect")
_convolution("grouped conv → bn", groups=2)
_convolution("depthwise conv → bn", groups=4, bias=False)
_transposed("transposed conv → bn")
_transposed("transposed conv → bn, Cin = Cout", out=4)
_transposed("transposed conv1d, strided → bn", n=1, stride=2, padding=1, output_padding=1)
_transposed("grouped transposed conv → bn", groups=2)


@pattern(FAMILY, "linear → bn on (N, C)", noise(6, 3))
def rows() -> nn.Module:
    return lively(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))


@pattern(FAMILY, "linear → bn on (N, L, C), L = C", noise(2, 5, 3), least=1)
def square_sequence() -> nn.Module:
    return lively(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))


@pattern(FAMILY, "linear → bn on (N, L, C), L ≠ C", noise(2, 6, 3), least=1)
def sequence() -> nn.Module:
    return lively(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(6)))


@pattern(FAMILY, "linear → transpose → bn", noise(2, 6, 3))
def transposed_sequence() -> nn.Module:
    wiring = lambda m, x: m.bn(m.linear(x).transpose(1, 2))  # noqa: E731
    return lively(Wired(wiring, linear=nn.Linear(3, 5), bn=nn.BatchNorm1d(5)))


@pattern(FAMILY, "linear → flatten → bn → unflatten", noise(2, 6, 3))
def flattened_sequence() -> nn.Module:
    wiring = lambda m, x: m.bn(m.linear(x).flatten(0, 1)).reshape(2, 6, 5)  # noqa: E731
    return lively(Wired(wiring, linear=nn.Linear(3, 5), bn=nn.BatchNorm1d(5)))


@pattern(FAMILY, "linear → flatten → bn → reshape_as what the linear layer returned", noise(2, 6, 3))
def shape_of_the_output() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.linear(x)
        return m.bn(y.flatten(0, 1)).reshape_as(y)  # type: ignore[no-any-return]

    return lively(Wired(wiring, linear=nn.Linear(3, 5), bn=nn.BatchNorm1d(5)))


@pattern(FAMILY, "embedding → transpose → bn", numbers(9, 3, 6))
def embedding() -> nn.Module:
    wiring = lambda m, x: m.bn(m.table(x).transpose(1, 2))  # noqa: E731
    return lively(Wired(wiring, table=nn.Embedding(9, 5), bn=nn.BatchNorm1d(5)))


@pattern(FAMILY, "embedding with padding_idx → bn", numbers(9, 6))
def padded_embedding() -> nn.Module:
    return lively(nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.BatchNorm1d(5)))
