"""The causes, one file each."""

from __future__ import annotations

from batchnorm.diagnosis.causes.average_not_arrived import AverageNotArrived
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.diagnosis.causes.domain_shift import DomainShift
from batchnorm.diagnosis.causes.frozen_wrong import FrozenWrong
from batchnorm.diagnosis.causes.momentum_convention import MomentumConvention
from batchnorm.diagnosis.causes.never_updated import NeverUpdated
from batchnorm.diagnosis.causes.poisoned import Poisoned
from batchnorm.diagnosis.causes.stale import Stale
from batchnorm.diagnosis.causes.train_mode import TrainMode

__all__ = ["CAUSES"]

CAUSES: tuple[type[Cause], ...] = (
    TrainMode,
    Poisoned,
    NeverUpdated,
    FrozenWrong,
    AverageNotArrived,
    MomentumConvention,
    DomainShift,
    Stale,
)
"""Every cause, the more certain before the less certain: each explains gaps that those after it then leave alone."""
