"""A model that is as bad on batch statistics is told so."""

from __future__ import annotations

import pytest
import torch
from tests.diagnosis.metrics import CLASSES

import batchnorm


@pytest.mark.parametrize("metric", CLASSES, ids=lambda metric: metric.__name__)
def test_a_model_that_is_as_bad_on_batch_statistics_is_told_so(net, labelled, metric) -> None:
    batches = labelled(metric)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (net.conv2, net.fc3, net.fc4, net.head):
            layer.weight.copy_(layer.weight[torch.randperm(len(layer.weight), generator=g)])
            net.head.bias.copy_(net.head.bias.roll(2))
    shuffled = [(x, y[torch.randperm(len(y), generator=g)]) for x, y in batches]
    result = batchnorm.diagnose(net, shuffled, metric)
    assert [(finding.cause, finding.layer) for finding in result.findings] == [("not_the_norms", "")]
