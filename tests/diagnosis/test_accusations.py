"""Every cause is asked, and the faults come in order."""

from __future__ import annotations

import torch

import batchnorm


def test_names_are_those_that_may_be_accused(net, batches) -> None:
    net.bn2.reset_running_stats()
    net.bn4.reset_running_stats()
    (finding,) = batchnorm.diagnose(net, batches, names="bn4").findings
    assert (finding.layer, finding.layers) == ("bn4", ("bn4",))
    assert batchnorm.diagnose(net, batches, names="bn1").healthy


def test_two_faults_are_two_findings_the_fatal_one_first(net, batches) -> None:
    net.bn1.reset_running_stats()
    net.bn4.running_var[0] = torch.inf
    findings = batchnorm.diagnose(net, batches).findings
    assert [(f.cause, f.layer) for f in findings] == [("poisoned", "bn4"), ("never_updated", "bn1")]
