"""A small U-Net: transposed convolutions with norms, and concatenations of what goes down with what comes up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["UNet"]


def _block(into: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (into, out):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class _Up(nn.Module):
    """Twice the size, half the channels, then the skipped features beside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.up = nn.ConvTranspose2d(channels, half, 2, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(half)
        self.block = _block(channels, half)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        return self.block(torch.cat([skipped, torch.relu(self.bn(self.up(x)))], 1))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Three levels, from 3 channels to 2."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(3, width), _block(width, 2 * width), _block(2 * width, 4 * width)])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList([_Up(4 * width), _Up(2 * width)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return two maps of the picture's size."""
        first = self.down[0](x)
        second = self.down[1](self.pool(first))
        y = self.down[2](self.pool(second))
        return self.head(self.up[1](self.up[0](y, second), first))  # type: ignore[no-any-return]
