"""Units that no longer learn: saturated behind a sigmoid or tanh, dead behind a ReLU."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from batchnorm.models.float64 import float64_device
from batchnorm.monitor.positions import distance, parts
from batchnorm.monitor.stream import PANES

__all__ = ["SLOPE", "ActivationCall", "ActivationStream", "ActivationUse", "activation_of"]

SLOPE = 0.05
"""A sigmoid or tanh unit is saturated where its derivative is below this share of the derivative's maximum."""

# tanh′(z) = 1 − tanh²(z) with maximum 1 at 0, and sigmoid(z) = (1 + tanh(z/2))/2.
_TANH_LIMIT = math.atanh(math.sqrt(1 - SLOPE))

ActivationKind: TypeAlias = Literal["sigmoid", "tanh", "hardsigmoid", "hardtanh", "relu", "relu6"]


@dataclass(frozen=True)
class ActivationCall:
    r"""A call of an activation function, by what leaves its units without gradient.

    A unit of kind ``sigmoid``, ``tanh``, ``hardsigmoid`` or ``hardtanh`` is saturated at a pre-activation z outside
    [low, high]. For the smooth two the derivative is there below 5 % of its maximum:

    .. math::

        |z| > \operatorname{artanh}\sqrt{1 - 0.05} = 2.178 \;\text{(tanh)} \qquad |z| > 4.357 \;\text{(sigmoid)}

    and for the hard two it is 0 (beyond −3 and 3, or beyond the bounds of the call). A unit of kind ``relu`` or
    ``relu6`` fires at z > 0.
    """

    kind: ActivationKind
    low: float = 0.0
    high: float = math.inf

    @property
    def rectifies(self) -> bool:
        """Whether units die here (ReLU) rather than saturate."""
        return self.kind in ("relu", "relu6")


_FIXED = {
    "sigmoid": ActivationCall("sigmoid", -2 * _TANH_LIMIT, 2 * _TANH_LIMIT),
    "tanh": ActivationCall("tanh", -_TANH_LIMIT, _TANH_LIMIT),
    "hardsigmoid": ActivationCall("hardsigmoid", -3.0, 3.0),
    "relu": ActivationCall("relu"),
    "relu6": ActivationCall("relu6"),
}


def activation_of(operator: str, arguments: Mapping[str, Any]) -> ActivationCall | None:
    """Return which activation a call of an operator is, or None.

    ReLU has several spellings: ``relu``, ``clamp(min=0)``, ``clamp_min(0)``, ``threshold(0, 0)``, ``hardtanh(0, 6)``.

    Args:
        operator: name without namespace and without the underscore of an in-place version.
        arguments: its arguments by name.
    """
    if operator in _FIXED:
        return _FIXED[operator]
    low, high = arguments.get("min"), arguments.get("max")
    if operator == "hardtanh":
        low, high = arguments.get("min_val", -1), arguments.get("max_val", 1)
        if low != 0:
            return ActivationCall("hardtanh", float(low), float(high))
    elif operator == "threshold":
        low = 0 if arguments.get("threshold") == arguments.get("value") == 0 else None
    elif operator not in ("clamp", "clamp_min"):
        return None
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0:
        return None
    return ActivationCall("relu") if high is None else ActivationCall("relu6")


@dataclass(frozen=True)
class ActivationUse:
    """What one activation met.

    Attributes:
        name: of the module that called it; with ``#2`` when it is not that module's first call of the function.
        kind: which function.
        units: number of channels, or of features.
        values: number of pre-activations seen; of large feature maps a part.
        saturated: share of them in the saturated range; None behind a ReLU.
        stuck: units that were saturated at every value seen; None behind a ReLU.
        dead: units that fired at no value seen; None behind others than a ReLU.
    """

    name: str
    kind: ActivationKind
    units: int
    values: int
    saturated: float | None
    stuck: tuple[int, ...] | None
    dead: tuple[int, ...] | None


@dataclass
class _Pane:
    """What a stretch of the stream has shown: for each unit how many values were saturated, or whether it fired."""

    count: Tensor
    values: int = 0  # looked at, per unit
    fired: bool = False  # all units have


class ActivationStream:
    """What one activation has met, all of it or the last so many samples. Several threads may add to it at once.

    Args:
        name: of the module that calls it.
        activation: which function.
        units: how many.
        device: where the pre-activations are.
        window: how many samples count, the last ones; None for all. They are forgotten a quarter at a time.
    """

    def __init__(
        self, name: str, activation: ActivationCall, units: int, device: torch.device, window: int | None = None
    ) -> None:
        self.name = name
        self.activation = activation
        self.units = units
        self._step = None if window is None else max(1, window // PANES)
        self._samples = 0
        self._lock = threading.RLock()
        # float64 counts exactly up to 2^53; behind a ReLU whether the unit has fired
        kind = torch.bool if activation.rectifies else torch.float64
        self._nothing = torch.zeros(units, dtype=kind, device=float64_device(device))
        self._panes: dict[int, _Pane] = {0: _Pane(self._nothing)}

    def add(self, z: Tensor, unit_dim: int) -> None:
        """Add the pre-activations of one call. A value that is NaN counts as fired, and as not saturated.

        Of large feature maps some rows are looked at (see :mod:`batchnorm.monitor.positions`); behind a ReLU nothing
        any more once all units have fired.
        """
        if z.numel() == 0:
            return
        unit_dim %= z.dim()
        with self._lock:
            first, pane = self._samples, self._pane()
            self._samples += 1 if unit_dim == 0 else z.shape[0]
            if pane.fired:
                pane.values += z.numel() // self.units // (distance(z.shape) if unit_dim == 1 else 1)
                return
        seen = parts(z, first) if unit_dim == 1 else [z]
        found = [self._of(part, [d for d in range(part.dim()) if d != unit_dim]) for part in seen]
        with self._lock:
            pane.values += sum(part.numel() for part in seen) // self.units
            for each in found:
                each = each.to(pane.count.device)
                pane.count = pane.count | each if self.activation.rectifies else pane.count + each.double()
            if found and self.activation.rectifies and z.device.type == "cpu":  # elsewhere one would have to wait
                pane.fired = bool(pane.count.all())

    def _of(self, z: Tensor, others: list[int]) -> Tensor:
        """Return of each unit how many values are saturated, or behind a ReLU whether it fires."""
        if not self.activation.rectifies:
            return self._saturated(z, others)
        return ~((z.amax(others) if others else z) <= 0)

    def _pane(self) -> _Pane:
        index = 0 if self._step is None else self._samples // self._step
        if index not in self._panes:
            self._panes[index] = _Pane(self._nothing)
            for old in [i for i in self._panes if i <= index - PANES]:
                del self._panes[old]
        return self._panes[index]

    def _saturated(self, z: Tensor, others: list[int]) -> Tensor:
        """Return the number of saturated values of each unit."""
        low, high, hard = self.activation.low, self.activation.high, self.activation.kind.startswith("hard")
        if low == -high:
            size = z.abs()
            outside = size.ge_(high) if hard else size.gt_(high)
        else:
            outside = ((z <= low) | (z >= high)).to(z.dtype)
        # Ones add up exactly in float32 as far as 2^24, and several times faster than in float64.
        few = z.numel() <= self.units * 2**24
        return outside.sum(others, dtype=torch.float32 if few else torch.float64) if others else outside

    def result(self) -> ActivationUse:
        """Return what has been counted."""
        with self._lock:
            panes = [(pane.count, pane.values) for pane in self._panes.values()]
        per_unit = sum(values for _, values in panes)
        values = per_unit * self.units
        if self.activation.rectifies:
            fired = reduce(torch.logical_or, (count for count, _ in panes))
            dead = tuple((~fired).nonzero().flatten().tolist()) if values else ()
            return ActivationUse(self.name, self.activation.kind, self.units, values, None, None, dead)
        total = reduce(torch.add, (count for count, _ in panes))
        stuck = tuple((total == per_unit).nonzero().flatten().tolist()) if values else ()
        share = float(total.sum()) / values if values else None
        return ActivationUse(self.name, self.activation.kind, self.units, values, share, stuck, None)
