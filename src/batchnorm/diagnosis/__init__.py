"""Why eval mode differs from training: which norm is guilty, of what, and what helps."""

from batchnorm.diagnosis.diagnose import diagnose
from batchnorm.diagnosis.result import DiagnoseResult, Finding, Metrics

__all__ = ["DiagnoseResult", "Finding", "Metrics", "diagnose"]
