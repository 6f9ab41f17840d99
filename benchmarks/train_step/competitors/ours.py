"""This library: one layer for norm, add and ReLU, which may write over its input; networks through ``convert``."""

from __future__ import annotations

import inspect
from typing import Any

from benchmarks.train_step.cases import Layer
from benchmarks.train_step.competitors import NotOfferedError
from torch import Tensor, nn

import batchnorm
from batchnorm.functional import active_backend


def layer(case: Layer) -> nn.Module:
    kind = batchnorm.nn.BatchNorm1d if len(case.shape) == 2 else batchnorm.nn.BatchNorm2d
    if "relu" not in case.work:
        return kind(case.channels)
    extra = {"inplace": True} if "inplace" in inspect.signature(kind).parameters else {}
    return kind(case.channels, activation="leaky_relu" if "leaky" in case.work else "relu", **extra)


def backend(layer: batchnorm.nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> str:
    return active_backend(
        x, training=True, weight=layer.weight, bias=layer.bias, activation=layer.activation, residual=residual
    )


def network(model: nn.Module, example: Tensor) -> nn.Module:
    if "fuse" not in inspect.signature(batchnorm.convert).parameters:
        raise NotOfferedError("this version of batchnorm has no convert(fuse=True)")
    convert: Any = batchnorm.convert
    fused: nn.Module = convert(model, example, fuse=True).model
    return fused
