"""What a cause may look at, and what the training batches exclude."""

from __future__ import annotations

import pytest

import batchnorm


@pytest.mark.parametrize(
    "change", [lambda x: 1 - x, lambda x: x + 2, lambda x: x.flip(1) ** 2], ids=["1 − x", "+ 2", "²"]
)
def test_statistics_that_fit_the_training_batches_exclude_faults_of_the_model(net, batches, home, change) -> None:
    sparse = [batch * (batch.abs() > 1) for batch in batches]  # mostly one vector, as padding is
    at_home = [batch * (batch.abs() > 1) for batch in home]
    batchnorm.recalibrate(net, at_home)
    result = batchnorm.diagnose(net, [change(x) for x in sparse], training_batches=at_home)
    assert {finding.cause for finding in result.findings} <= {"domain_shift", "input_preparation"}
    assert result.findings
