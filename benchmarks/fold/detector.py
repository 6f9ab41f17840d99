"""A small detector whose head is one for all sizes of the feature maps, but for its norms: each size has its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Detector"]


def _down(into: int, out: int) -> nn.Sequential:
    conv = nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class _Head(nn.Module):
    """Two convolutions that all sizes share, and a norm behind each for each size."""

    def __init__(self, width: int, outputs: int, sizes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.ModuleList([nn.BatchNorm2d(width) for _ in range(sizes)]) for _ in range(2)])
        self.last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        found = []
        for size, x in enumerate(maps):
            for conv, norms in zip(self.convs, self.norms, strict=True):
                x = torch.relu(norms[size](conv(x)))  # type: ignore[index]
            found.append(self.last(x).flatten(2))
        return torch.cat(found, 2)


class Detector(nn.Module):
    """Three sizes, from 3 channels; classes and boxes of every place, in a dict."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(_down(3, width), _down(width, width))
        self.down = nn.ModuleList([_down(width, width) for _ in range(2)])
        self.across = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)) for _ in range(3)]
        )
        self.classes, self.boxes = _Head(width, 5, 3), _Head(width, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``{"classes": (N, 5, places), "boxes": (N, 4, places)}``."""
        maps = [self.stem(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        maps = [across(one) for across, one in zip(self.across, maps, strict=True)]
        for i in (1, 0):
            larger = nn.functional.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
            maps[i] = maps[i] + larger
        return {"classes": self.classes(maps), "boxes": self.boxes(maps)}
