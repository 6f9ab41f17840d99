"""A cure that makes the metric worse is not told, and what harms nobody is no fault."""

from __future__ import annotations

from tests.diagnosis.metrics import accuracy

import batchnorm


def test_no_cure_is_told_that_makes_the_metric_worse(net, labelled, batches) -> None:
    """One norm is right to be off, another is poisoned."""
    net.bn2.running_mean.add_(2 * net.bn2.running_var.sqrt())
    made = labelled(accuracy)
    net.bn4.running_mean.add_(3 * net.bn4.running_var.sqrt())
    result = batchnorm.diagnose(net, made, accuracy)
    for finding in result.findings:
        assert finding.gain is None or finding.gain.metric_after >= finding.gain.metric_before
        assert finding.cure or "No cure is told" in finding.evidence
