"""Rules about where norms stand and how they are used, and what mends a model that breaks one.

::

    model, example inputs ── runner ── dataflow ── rules: findings ── fix: a changed copy ── verify: the same model?
"""

from batchnorm.checks.fix import FixResult
from batchnorm.checks.rule import Finding, Fix, Rule
from batchnorm.checks.rules import RULES
from batchnorm.checks.runner import CheckResult, check

__all__ = ["RULES", "CheckResult", "Finding", "Fix", "FixResult", "Rule", "check"]
