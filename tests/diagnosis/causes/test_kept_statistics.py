"""Statistics that do not fit and are right are a note."""

from __future__ import annotations

import pytest
from tests.diagnosis.metrics import HIGHER

import batchnorm


@pytest.mark.parametrize("metric", HIGHER, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("count", [1, 6])
def test_statistics_that_the_model_needs_are_no_fault(net, labelled, metric, frozen: bool, count: int) -> None:
    """What is wanted is what the network gives with these statistics: as after a fine-tuning with frozen norms."""
    for norm in (net.bn2, net.bn3, net.bn4):
        norm.running_mean.add_(1.5 * norm.running_var.sqrt())
    if frozen:
        batchnorm.freeze(net)
    result = batchnorm.diagnose(net, labelled(metric)[:count], metric)
    assert result.healthy
    assert "kept_statistics" in [note.cause for note in result.notes]
