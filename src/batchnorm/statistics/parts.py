"""The moments of many batches that came to a norm as one tensor, each batch by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.kernels.contract import Request
from batchnorm.kernels.native import NATIVE
from batchnorm.moments import Moments

__all__ = ["Parts"]

_CHUNK = 1 << 20
"""How many values are turned into float64 at a time."""


@dataclass(frozen=True)
class Parts:
    r"""Mean and M2 of each of G equal parts of a tensor, float64, (G, C).

    Attributes:
        count: how many values a channel of one part has.
        mean: their means.
        m2: their sums of squared deviations.
    """

    count: int
    mean: Tensor
    m2: Tensor

    def __len__(self) -> int:
        """Return how many parts there are."""
        return len(self.mean)

    @classmethod
    def of(cls, x: Tensor, number: int) -> Parts:
        """Return those of ``x``, (N, C, ...), cut along the first dimension into so many parts of equal length."""
        x = x.detach()
        samples, channels = x.shape[:2]
        space = x[0, 0].numel()
        plane = x.reshape(1, samples * channels, space) if x.is_contiguous() and space > 1 else None
        if plane is not None and NATIVE.refusal(Request(plane, training=True, mask=None)) is None:
            each = NATIVE.moments(plane)  # every channel of every sample: a part is several of these
            mean, m2 = (t.view(number, -1, channels) for t in (each.mean, each.m2))
            return cls(samples // number * space, *_merged(space, mean, m2))
        values = x.reshape(number, samples // number, channels, space)
        at_once = max(1, _CHUNK * number // max(1, x.numel()))
        found = [_two_pass(part.double()) for part in values.split(at_once)]
        return cls(samples // number * space, *(torch.cat(t) for t in zip(*found, strict=True)))

    def one(self, index: int) -> Moments:
        """Return the moments of one part."""
        return self.together(index, index + 1)

    def together(self, start: int = 0, end: int | None = None) -> Moments:
        """Return the moments of the parts from ``start`` to before ``end`` as of one set."""
        mean, m2 = self.mean[start:end], self.m2[start:end]
        number = len(mean)
        count = torch.full_like(mean[0], number * self.count)
        if number == 1:
            return Moments(count, mean[0].clone(), m2[0].clone())
        return Moments(count, *(t[0] for t in _merged(self.count, mean[None], m2[None])))


def _merged(count: int, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge along the second dimension what has ``count`` values each (Chan, Golub & LeVeque 1979, eq. 2.1)."""
    total = mean.mean(1)
    return total, m2.sum(1) + count * (mean - total[:, None]).square().sum(1)


def _two_pass(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.mean((1, 3))
    deviation = values - mean[:, None, :, None]
    count = max(1, values.shape[1] * values.shape[3])
    m2 = deviation.square().sum((1, 3)) - deviation.sum((1, 3)).square() / count
    return mean, m2.clamp(min=0)
