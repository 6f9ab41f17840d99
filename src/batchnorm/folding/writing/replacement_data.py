"""What stays of a norm's module, as data that a file takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.folding.planning.replacement import Replacement
from batchnorm.nn.scale_shift import ScaleShift

__all__ = ["Part", "from_data", "to_data"]

Part: TypeAlias = str | Mapping[str, Any]
"""The name of a submodule that goes on running, or an activation or layer: its class, and the settings that it has."""

_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_SETTINGS: Mapping[str, Sequence[str]] = {
    **{f"Conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": (*_CONVOLUTION, "output_padding") for n in (1, 2, 3)},
    "Linear": ("in_features", "out_features"),
    "ELU": ("alpha",),
    "GELU": ("approximate",),
    "Hardsigmoid": (),
    "Hardswish": (),
    "Hardtanh": ("min_val", "max_val"),
    "LeakyReLU": ("negative_slope",),
    "Mish": (),
    "ReLU": (),
    "ReLU6": (),
    "SiLU": (),
    "Sigmoid": (),
    "Tanh": (),
}


def to_data(stays: Replacement) -> list[Part]:
    """Return the parts as strings and numbers.

    >>> to_data(Replacement(("drop", nn.LeakyReLU(0.2))))
    ['drop', {'class': 'LeakyReLU', 'negative_slope': 0.2}]
    """
    return [part if isinstance(part, str) else _described(part) for part in stays.parts]


def from_data(parts: Sequence[Part]) -> Replacement:
    """Return what :func:`to_data` described.

    Raises:
        StateError: it is an activation that only another version of this library writes.
    """
    return Replacement(tuple(part if isinstance(part, str) else _built(part) for part in parts))


def _described(module: Module) -> Part:
    kind = type(module).__name__
    if isinstance(module, ScaleShift):
        dtype = str(module.weight.dtype).removeprefix("torch.")
        return {"class": kind, "channels": len(module.weight), "dtype": dtype, "fused": module.fused}
    settings = {key: getattr(module, key) for key in _SETTINGS[kind]}
    if "bias" in module._parameters:
        settings["bias"] = module.bias is not None
    return {"class": kind, **settings}


def _built(part: Mapping[str, Any]) -> Module:
    kind = part["class"]
    if kind == "ScaleShift":
        dtype, channels = getattr(torch, part["dtype"]), part["channels"]
        return ScaleShift(torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype), None, part["fused"])
    if kind not in _SETTINGS:
        raise StateError(f"The pairs have a {kind} in the place of a module, which this version cannot build.")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in part.items()}
    del settings["class"]
    module: Module = getattr(nn, kind)(**settings)
    return module
