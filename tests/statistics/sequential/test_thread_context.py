"""What belongs to a thread reaches the thread that runs the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.statistics import recalibrate


def test_autocast_the_default_device_and_context_variables_reach_the_model() -> None:
    from contextvars import ContextVar

    scale: ContextVar[float] = ContextVar("scale", default=1.0)
    seen: list[Any] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            seen.append((y.dtype, torch.empty(0).device.type, scale.get()))
            return self.norm(y)

    model = Asks()
    scale.set(2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        recalibrate(model, [torch.randn(8, 3, device="cpu"), torch.randn(8, 3, device="cpu")])
    assert set(seen) == {(torch.bfloat16, "meta", 2.0)}
