"""A case as the parts of a diagnosis meet it: made of numbers, without a model that runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from batchnorm.diagnosis.case import Case
from batchnorm.diagnosis.goal import Goal
from batchnorm.diagnosis.passes import Pass
from batchnorm.diagnosis.readings import Reading

__all__ = ["case_of", "gap", "run_of"]


def run_of(*values: float, other: float = 0.0) -> Pass:
    """A run with the metric of each batch, more being better, and what outputs of other samples would give."""
    readings = tuple(Reading(10, value, other, other) for value in values)
    return Pass({}, sum(values) / len(values) if values else None, readings)


def gap(name: str, *, off: bool = True, excess: float = 1.0, distance: float = 1.0) -> Any:
    """The gap of a norm."""
    return SimpleNamespace(name=name, off=off, excess=lambda: excess, distance=distance, site=name)


def case_of(
    *layers: Any,
    deployed: Pass | None = None,
    training: Pass | None = None,
    recalibrated: Pass | None = None,
    told: bool | None = True,
    frozen: Sequence[str] = (),
    home: Sequence[Any] | None = None,
    passes: Any = None,
    model: nn.Module | None = None,
) -> Case:
    """A case with these gaps, in which eval mode, batch statistics and population statistics gave these runs."""
    deployed = deployed or run_of()
    training, recalibrated = training or deployed, recalibrated or deployed
    gaps: Any = SimpleNamespace(
        layers=layers,
        deployed=deployed,
        training=training,
        recalibrated=recalibrated,
        population={n.site: n.site for n in layers},
    )
    sites: Any = None
    goal = Goal(deployed, training, recalibrated, told)
    frozen_by = dict.fromkeys(frozen, "frozen by batchnorm.freeze")
    return Case(model or nn.Identity(), False, {}, sites, passes, gaps, home, frozen_by, goal)
