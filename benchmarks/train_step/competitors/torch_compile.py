"""torch's own layers, compiled by inductor for the one shape; the compilation itself is not timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from benchmarks.train_step.cases import Layer
from benchmarks.train_step.competitors import NotOfferedError
from benchmarks.train_step.competitors.torch_eager import Work
from torch import Tensor, nn


def layer(case: Layer) -> Callable[..., Tensor]:
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(Work(case), dynamic=False, fullgraph=True)
    return compiled


def backend(layer: Callable[..., Tensor], *inputs: Tensor) -> str:
    return "inductor"


def network(model: nn.Module, example: Tensor) -> nn.Module:
    raise NotOfferedError("networks are compared as torch runs them by default")
