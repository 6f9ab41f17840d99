"""torch's own layers at their best: add and ReLU write over the norm's output, which no backward pass needs."""

from __future__ import annotations

import torch.nn.functional as F
from benchmarks.train_step.cases import Layer
from torch import Tensor, nn


class Work(nn.Module):
    """A norm, then an add, then ReLU, as far as the case asks for them."""

    def __init__(self, case: Layer) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(case.channels) if len(case.shape) == 2 else nn.BatchNorm2d(case.channels)
        self.relu = "relu" in case.work
        self.slope = 0.01 if "leaky" in case.work else 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return what the norm, the add and ReLU make of x."""
        y = self.norm(x)
        if residual is not None:
            y += residual
        if self.slope:
            return F.leaky_relu(y, self.slope, inplace=True)
        return F.relu(y, inplace=True) if self.relu else y


def layer(case: Layer) -> nn.Module:
    return Work(case)


def backend(layer: nn.Module, *inputs: Tensor) -> str:
    return "torch"


def network(model: nn.Module, example: Tensor) -> nn.Module:
    return model
