"""Why eval mode differs from training: which norm is guilty, of what, and what helps.

::

    batches ── passes ── gaps: stored beside met ── causes/: suspicions ── trial of each cure ── accusations: findings
"""

from batchnorm.diagnosis.diagnose import diagnose
from batchnorm.diagnosis.result import DiagnoseResult, Finding, Metrics

__all__ = ["DiagnoseResult", "Finding", "Metrics", "diagnose"]
