"""What stays of a norm's module, as data that a file takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn
from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.graph.stand_in import StandIn

__all__ = ["Part", "from_data", "to_data"]

Part: TypeAlias = str | Mapping[str, Any]
"""The name of a submodule that goes on running, or an activation: its class, and the settings that it has."""

_SETTINGS: Mapping[str, Sequence[str]] = {
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


def to_data(stays: StandIn) -> list[Part]:
    """Return the parts as strings and numbers.

    >>> to_data(StandIn(("drop", nn.LeakyReLU(0.2))))
    ['drop', {'class': 'LeakyReLU', 'negative_slope': 0.2}]
    """
    return [part if isinstance(part, str) else _described(part) for part in stays.parts]


def from_data(parts: Sequence[Part]) -> StandIn:
    """Return what :func:`to_data` described.

    Raises:
        StateError: it is an activation that only another version of this library writes.
    """
    return StandIn(tuple(part if isinstance(part, str) else _built(part) for part in parts))


def _described(activation: Module) -> Part:
    kind = type(activation).__name__
    return {"class": kind, **{key: getattr(activation, key) for key in _SETTINGS[kind]}}


def _built(part: Mapping[str, Any]) -> Module:
    kind = part["class"]
    if kind not in _SETTINGS:
        raise StateError(f"The pairs have a {kind} in the place of a norm, which this version cannot build.")
    activation: Module = getattr(nn, kind)(**{key: part[key] for key in _SETTINGS[kind]})
    return activation
