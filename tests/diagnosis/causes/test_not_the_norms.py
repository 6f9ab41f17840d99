"""A model that is as bad on batch statistics is told so."""

from __future__ import annotations

import pytest
import torch
from tests.diagnosis.case_of import case_of, gap, run_of
from tests.diagnosis.metrics import CLASSES

import batchnorm
from batchnorm.diagnosis.causes.not_the_norms import NotTheNorms


@pytest.mark.every(3)
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


@pytest.mark.parametrize(("at_chance", "hopeful", "told"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_it_is_told_of_a_model_at_chance_that_nothing_helps(at_chance: bool, hopeful: bool, told: int) -> None:
    case = case_of(gap("a"), deployed=run_of(0.11), training=run_of(0.125, other=0.1), recalibrated=run_of(0.12))
    vars(case.goal)["at_chance"], case.hopeful = at_chance, hopeful
    found = list(NotTheNorms().find(case))
    assert len(found) == told
    for suspicion in found:
        assert (suspicion.layers, suspicion.cure) == ([""], "")
        assert (
            "the metric is 0.11 in eval mode, 0.125 on batch statistics, 0.12 after a trial recalibration, and 0.1 if "
            "each sample is given the output for another one" in suspicion.evidence
        )
