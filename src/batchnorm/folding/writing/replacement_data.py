"""What stays of a norm's module, as data that a file takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.folding.planning.replacement import Replacement
from batchnorm.folding.writing.forms import (
    Holds,
    is_bool,
    is_count,
    is_name,
    is_number,
    is_size,
    list_of,
    one_of,
    or_none,
)
from batchnorm.kernels.activation import activation_called
from batchnorm.nn.scale_shift import ScaleShift

__all__ = ["Part", "from_data", "is_part", "to_data"]

Part: TypeAlias = str | Mapping[str, Any]
"""The name of a submodule that goes on running, or an activation or layer: its class, and the settings that it has."""


def _is_end(value: Any) -> bool:
    """Whether it can end a range: it may have none."""
    return is_number(value) or value in (math.inf, -math.inf)


def _convolution(n: int) -> Mapping[str, Holds]:
    by_axis, by_axis_or_none = list_of(is_count, n), list_of(is_size, n)
    return {
        "in_channels": is_count,
        "out_channels": is_count,
        "kernel_size": by_axis,
        "stride": by_axis,
        "padding": lambda value: by_axis_or_none(value) or one_of("same", "valid")(value),
        "dilation": by_axis,
        "groups": is_count,
    }


_SETTINGS: Mapping[str, Mapping[str, Holds]] = {
    **{f"Conv{n}d": _convolution(n) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": {**_convolution(n), "output_padding": list_of(is_size, n)} for n in (1, 2, 3)},
    "Linear": {"in_features": is_count, "out_features": is_count},
    "ELU": {"alpha": is_number},
    "GELU": {"approximate": one_of("none", "tanh")},
    "Hardsigmoid": {},
    "Hardswish": {},
    "Hardtanh": {"min_val": _is_end, "max_val": _is_end},
    "LeakyReLU": {"negative_slope": is_number},
    "Mish": {},
    "ReLU": {},
    "ReLU6": {},
    "SiLU": {},
    "Sigmoid": {},
    "Tanh": {},
}
_MULTIPLY_ADD: Mapping[str, Holds] = {
    "channels": is_count,
    "dtype": one_of("float32", "float64"),
    "fused": or_none(lambda value: isinstance(value, str) and activation_called(value) is not None),
}


def is_part(value: Any) -> bool:
    """Whether data from a file is a part that can be built, or of a class that only another version builds."""
    if isinstance(value, str):
        return is_name(value)
    if not isinstance(value, dict) or not isinstance(value.get("class"), str):
        return False
    kind = value["class"]
    expected = dict(_MULTIPLY_ADD if kind == "ScaleShift" else _SETTINGS.get(kind, {}))
    if _has_parameters(kind):
        expected["bias"] = is_bool
    if kind != "ScaleShift" and kind not in _SETTINGS:
        return True
    return value.keys() - {"class"} == expected.keys() and all(holds(value[key]) for key, holds in expected.items())


def _has_parameters(kind: str) -> bool:
    return kind == "Linear" or kind.startswith("Conv")


def to_data(stays: Replacement) -> list[Part]:
    """Return the parts as strings and numbers.

    >>> to_data(Replacement(("drop", nn.LeakyReLU(0.2))))
    ['drop', {'class': 'LeakyReLU', 'negative_slope': 0.2}]
    """
    return [part if isinstance(part, str) else _described(part) for part in stays.parts]


def from_data(parts: Sequence[Part]) -> Replacement:
    """Return what :func:`to_data` described; layers have parameters without memory.

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
        return ScaleShift(
            torch.ones(channels, dtype=dtype, device="cpu"),
            torch.zeros(channels, dtype=dtype, device="cpu"),
            None,
            part["fused"],
        )
    if kind not in _SETTINGS:
        raise StateError(f"The pairs have a {kind} in the place of a module, which this version cannot build.")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in part.items()}
    del settings["class"]
    if not _has_parameters(kind):
        return getattr(nn, kind)(**settings)  # type: ignore[no-any-return]
    module: Module = getattr(nn, kind)(**settings, device="meta")  # memory when a model has shown how much
    return module
