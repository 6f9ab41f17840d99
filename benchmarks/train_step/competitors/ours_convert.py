"""This library's norms in the place of torch's, one by one: ``convert`` without ``fuse``."""

from __future__ import annotations

from benchmarks.train_step.cases import Layer
from benchmarks.train_step.competitors import NotOfferedError
from torch import Tensor, nn

import batchnorm


def layer(case: Layer) -> nn.Module:
    raise NotOfferedError("a single layer is that of `ours`")


def backend(layer: nn.Module, *inputs: Tensor) -> str:
    return "torch"


def network(model: nn.Module, example: Tensor) -> nn.Module:
    return batchnorm.convert(model).model
