"""Norms and convolutions that are not quite torch's own."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.fold.patterns.pattern import Wired, lively, noise, pattern
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

FAMILY = "unusual norms and convolutions"
IMAGES = noise(2, 3, 7, 7)


class NormAct(nn.BatchNorm2d):
    """A norm and its activation in one class, as timm has them."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, then activate."""
        return F.relu(super().forward(x))


class OwnConv(nn.Conv2d):
    """A convolution subclass that computes what its parent does."""


class PaddedConv(nn.Conv2d):
    """A convolution subclass that pads as TensorFlow does, more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad, then convolve."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class StandardizedConv(nn.Conv2d):
    """A convolution whose weight is computed in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the weight less its mean."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class FunctionalNorm(nn.Module):
    """A norm of the user's own making."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mu", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.1)
        self.gain = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        return F.batch_norm(x, self.mu, self.var, self.gain, None, False, 0.0, 0.25)  # type: ignore[arg-type]


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return twice the weight."""
        return weight * 2


def _pair(name: str, conv: Any, norm: Any) -> None:
    @pattern(FAMILY, name, IMAGES)
    def make() -> nn.Module:
        return lively(nn.Sequential(conv(3, 4, 3), norm(4)))


_pair("norm with affine=False", nn.Conv2d, lambda c: nn.BatchNorm2d(c, affine=False))
_pair("norm of another ε", nn.Conv2d, lambda c: nn.BatchNorm2d(c, eps=0.1))
_pair("norm + activation in one class", nn.Conv2d, NormAct)
_pair("SyncBatchNorm", nn.Conv2d, nn.SyncBatchNorm)
_pair("norm of the user's own, as a function", nn.Conv2d, FunctionalNorm)
_pair("convolution subclass", OwnConv, nn.BatchNorm2d)
_pair("convolution subclass that pads", PaddedConv, nn.BatchNorm2d)
_pair("convolution with standardized weight", StandardizedConv, nn.BatchNorm2d)
_pair("weight_norm", lambda *a: parametrizations.weight_norm(nn.Conv2d(*a)), nn.BatchNorm2d)
_pair("weight_norm, the old one", lambda *a: nn.utils.weight_norm(nn.Conv2d(*a)), nn.BatchNorm2d)


@pattern(FAMILY, "parametrized weight", IMAGES)
def parametrized() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    nn.utils.parametrize.register_parametrization(conv, "weight", Doubled())
    return lively(nn.Sequential(conv, nn.BatchNorm2d(4)))


@pattern(FAMILY, "functional norm, buffers of the model", IMAGES)
def functional() -> nn.Module:
    def wiring(m: Any, x: Tensor) -> Tensor:
        bn = m.bn
        return F.batch_norm(m.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    return lively(Wired(wiring, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))


@pattern(FAMILY, "norm called by keyword", IMAGES)
def keyword() -> nn.Module:
    return lively(Wired(lambda m, x: m.bn(input=m.conv(x)), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))


@pattern(FAMILY, "norm in train mode", IMAGES, least=1)
def training() -> nn.Module:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].train()
    return model


@pattern(FAMILY, "norm without running statistics", IMAGES, least=1)
def untracked() -> nn.Module:
    return lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))


@pattern(FAMILY, "forward hook on the convolution", IMAGES, least=1)
def hooked_convolution() -> nn.Module:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].register_forward_hook(lambda module, args, output: output.tanh())
    return model


@pattern(FAMILY, "forward hook on the norm", IMAGES)
def hooked_norm() -> nn.Module:
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].register_forward_hook(lambda module, args, output: output.tanh())
    return model
