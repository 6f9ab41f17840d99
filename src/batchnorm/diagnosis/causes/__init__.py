"""The causes, one file each: a cause reads a case (gaps, passes, model), and yields suspicions with cures."""

from __future__ import annotations

from batchnorm.diagnosis.causes.average_not_arrived import AverageNotArrived
from batchnorm.diagnosis.causes.averaged_weights import AveragedWeights
from batchnorm.diagnosis.causes.batch_mates import BatchMates
from batchnorm.diagnosis.causes.biased_variance import BiasedVariance
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.diagnosis.causes.cumulative_average import CumulativeAverage
from batchnorm.diagnosis.causes.dead_channels import DeadChannels
from batchnorm.diagnosis.causes.domain_shift import DomainShift
from batchnorm.diagnosis.causes.eps_mismatch import EpsMismatch
from batchnorm.diagnosis.causes.frozen_wrong import FrozenWrong
from batchnorm.diagnosis.causes.half_precision import HalfPrecision
from batchnorm.diagnosis.causes.input_preparation import InputPreparation
from batchnorm.diagnosis.causes.kept_statistics import KeptStatistics
from batchnorm.diagnosis.causes.momentum_convention import MomentumConvention
from batchnorm.diagnosis.causes.never_updated import NeverUpdated
from batchnorm.diagnosis.causes.not_the_norms import NotTheNorms
from batchnorm.diagnosis.causes.padding import Padding
from batchnorm.diagnosis.causes.poisoned import Poisoned
from batchnorm.diagnosis.causes.pruned_weights import PrunedWeights
from batchnorm.diagnosis.causes.shared_norm import SharedNorm
from batchnorm.diagnosis.causes.small_batches import SmallBatches
from batchnorm.diagnosis.causes.stale import Stale
from batchnorm.diagnosis.causes.train_mode import TrainMode
from batchnorm.diagnosis.causes.untrained import Untrained
from batchnorm.diagnosis.causes.zero_init import ZeroInit

__all__ = ["CAUSES"]

CAUSES: tuple[type[Cause], ...] = (
    TrainMode,
    Untrained,
    Poisoned,
    HalfPrecision,
    FrozenWrong,
    NeverUpdated,
    BatchMates,
    ZeroInit,
    DeadChannels,
    SharedNorm,
    InputPreparation,
    AverageNotArrived,
    MomentumConvention,
    PrunedWeights,
    CumulativeAverage,
    BiasedVariance,
    EpsMismatch,
    SmallBatches,
    Padding,
    DomainShift,
    AveragedWeights,
    Stale,
    NotTheNorms,
    KeptStatistics,
)
"""Every cause, the more certain before the less certain: each explains gaps that those after it then leave alone."""
