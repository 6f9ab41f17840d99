"""The rules, one file each: a rule reads a model and its dataflow, and yields findings."""

from __future__ import annotations

from batchnorm.checks.rule import Rule
from batchnorm.checks.rules.batch_mode_in_eval import BatchModeInEval
from batchnorm.checks.rules.bias_before_norm import BiasBeforeNorm
from batchnorm.checks.rules.dropout_before_norm import DropoutBeforeNorm
from batchnorm.checks.rules.extreme_momentum import ExtremeMomentum
from batchnorm.checks.rules.few_values import FewValues
from batchnorm.checks.rules.functional_norm_without_mode import FunctionalNormWithoutMode
from batchnorm.checks.rules.implausible_eps import ImplausibleEps
from batchnorm.checks.rules.invalid_values import InvalidValues
from batchnorm.checks.rules.no_norm_before_saturation import NoNormBeforeSaturation
from batchnorm.checks.rules.norm_after_activation import NormAfterActivation
from batchnorm.checks.rules.norm_after_norm import NormAfterNorm
from batchnorm.checks.rules.norm_after_relu import NormAfterReLU
from batchnorm.checks.rules.norm_over_other_axis import NormOverOtherAxis
from batchnorm.checks.rules.shared_norm import SharedNorm
from batchnorm.checks.rules.statistics_never_updated import StatisticsNeverUpdated

__all__ = ["RULES"]

RULES: tuple[type[Rule], ...] = (
    BiasBeforeNorm,
    NormAfterReLU,
    NoNormBeforeSaturation,
    DropoutBeforeNorm,
    BatchModeInEval,
    StatisticsNeverUpdated,
    InvalidValues,
    ExtremeMomentum,
    ImplausibleEps,
    NormAfterNorm,
    NormOverOtherAxis,
    SharedNorm,
    FunctionalNormWithoutMode,
    FewValues,
    NormAfterActivation,
)
"""Every rule, by code."""
