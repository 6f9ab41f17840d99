"""What is measured: layers by work, layout, dtype and shape; whole networks by name.

The layer shapes are those of ResNet-50 on 224×224 pictures, written C@H=W in ``RESNET50``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

RESNET50 = ((64, 112), (256, 56), (64, 56), (512, 28), (128, 28), (1024, 14), (256, 14), (2048, 7), (512, 7))
SMALL = ((60, 100), (256, 256), (32, 16, 8, 8))
WORKS = ("norm", "norm+relu", "norm+add+relu")
BATCHES = (8, 32)
# float32 tables are about all of RESNET50; bfloat16 about these of it
BFLOAT16 = ((64, 112), (64, 56), (512, 28), (1024, 14), (512, 7))
MEMORY = ((64, 112), (64, 56))
NETWORKS = ("resnet18", "resnet50")


@dataclass(frozen=True)
class Layer:
    """One norm, with what follows it, in training.

    Attributes:
        group: which part of the report it belongs to.
        work: one of ``WORKS``, or "norm+leaky_relu".
        shape: (N, C, H, W), or (N, C).
        layout: "nchw"; "nhwc", that is channels-last; "rows" for (N, C).
        dtype: of the activations; parameters are float32.
    """

    group: str
    work: str
    shape: tuple[int, ...]
    layout: str = "nchw"
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """A name that ``--only`` matches."""
        return f"{self.group}/{self.work}/{self.layout}/{self.dtype}/{'x'.join(map(str, self.shape))}"

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[1]

    @property
    def numel(self) -> int:
        """How many elements the activation has."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def random(self, seed: int) -> Tensor:
        """Return values of this shape, dtype and layout, the same ones for every competitor."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(self.shape, generator=generator).mul_(2).add_(0.5).to(self.torch_dtype)
        return values.to(memory_format=torch.channels_last) if self.layout == "nhwc" else values


@dataclass(frozen=True)
class Network:
    """A whole training step of a network: forward, cross-entropy, backward, SGD."""

    work: str
    layout: str = "nchw"
    batch: int = 8
    group: str = "nets"
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """A name that ``--only`` matches."""
        return f"{self.group}/{self.work}/{self.layout}/{self.dtype}/{'x'.join(map(str, self.shape))}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pictures."""
        return (self.batch, 3, 224, 224)


Case: TypeAlias = Layer | Network


def all_cases() -> Iterator[Case]:
    """Yield every case, those that matter most first."""
    for batch in reversed(BATCHES):
        for layout in ("nchw", "nhwc"):
            for work in WORKS:
                for channels, side in RESNET50:
                    yield Layer("layers", work, (batch, channels, side, side), layout)
    for layout in ("nchw", "nhwc"):
        for channels, side in BFLOAT16:
            yield Layer("bfloat16", "norm+relu", (32, channels, side, side), layout, "bfloat16")
    for shape in SMALL:
        yield Layer("small", "norm", shape, "rows" if len(shape) == 2 else "nchw")
    for work in ("norm+relu", "norm+leaky_relu"):
        for channels, side in MEMORY:
            yield Layer("memory", work, (32, channels, side, side))
    for name in NETWORKS:
        for layout in ("nchw", "nhwc"):
            yield Network(name, layout)


def quick_cases() -> Iterator[Case]:
    """Yield a few cases of every group, to try the harness."""
    chosen = {(64, 56), (512, 7)}
    for case in all_cases():
        if isinstance(case, Network):
            if case.work == "resnet18" and case.layout == "nchw":
                yield case
        elif case.group == "small" or (case.shape[1:3] in chosen and case.shape[0] == 32):
            yield case
