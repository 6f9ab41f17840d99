"""The metric as the judge: which way is better, what is chance, and what is a fault by it."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.diagnosis.conftest import images
from tests.diagnosis.metrics import CLASSES, HIGHER, accuracy, cross_entropy
from torch import nn

import batchnorm


@pytest.mark.every(2)
@pytest.mark.parametrize("metric", HIGHER, ids=lambda metric: metric.__name__)
def test_which_way_is_better_is_found_out(net, labelled, metric) -> None:
    batches = labelled(metric)
    net.bn3.reset_running_stats()
    result = batchnorm.diagnose(net, batches, metric)
    assert result.metrics.higher_is_better is HIGHER[metric]
    (finding,) = result.findings
    assert finding.gain.closed > 0.5


@pytest.mark.parametrize("metric", CLASSES, ids=lambda metric: metric.__name__)
def test_which_way_is_better_is_found_out_of_a_model_that_is_worse_than_chance(net, labelled, metric) -> None:
    batches = labelled(metric)
    with torch.no_grad():
        net.head.weight.neg_()
        net.head.bias.neg_()
    assert batchnorm.diagnose(net, batches, metric).metrics.higher_is_better is HIGHER[metric]


def test_what_the_user_says_counts_and_then_the_attribute(net, labelled) -> None:
    class Metric:
        higher_is_better = True

        def __call__(self, output, batch):
            return cross_entropy(output, batch)

    batches = labelled(cross_entropy)
    assert batchnorm.diagnose(net, batches, Metric()).metrics.higher_is_better is True
    assert batchnorm.diagnose(net, batches, Metric(), higher_is_better=False).metrics.higher_is_better is False


@pytest.mark.parametrize("told", [True, False])
def test_which_way_is_better_of_no_metric_changes_nothing(net, batches, told: bool) -> None:
    net.bn3.reset_running_stats()
    result = batchnorm.diagnose(net, batches, higher_is_better=told)
    assert [(finding.cause, finding.layer) for finding in result.findings] == [("never_updated", "bn3")]
    assert result.metrics is None


def test_a_metric_of_outputs_alone_judges_nothing(net, batches) -> None:
    net.bn3.reset_running_stats()
    result = batchnorm.diagnose(net, batches, lambda output, batch: output.std())
    assert result.metrics.higher_is_better is None
    assert result.findings[0].cause == "never_updated"


@pytest.mark.every(5)
@pytest.mark.parametrize("metric", HIGHER, ids=lambda metric: metric.__name__)
def test_frozen_statistics_that_harm_are_a_fault(net, labelled, metric) -> None:
    batches = labelled(metric)
    for norm in (net.bn2, net.bn3, net.bn4):
        norm.running_mean.add_(1.5 * norm.running_var.sqrt())
    batchnorm.freeze(net)
    result = batchnorm.diagnose(net, batches, metric)
    assert not result.healthy
    assert result.findings[0].gain.closed > 0.5


def test_a_shift_of_the_data_is_mended_where_the_metric_says(net, labelled, batches) -> None:
    inverted = labelled(accuracy, [1 - 2 * batch for batch in batches])
    finding = batchnorm.diagnose(net, inverted, accuracy).findings[0]
    assert finding.cause == "domain_shift"
    assert finding.cure.startswith("batches = [")
    assert finding.gain.metric_after > finding.gain.metric_before


class Groups(nn.Module):
    """Batch norm beside group norm, for a regression."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.gn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        return self.out(self.gn(self.bn(self.conv(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("size", [8, 64])
def test_values_of_one_column(size: int) -> None:
    torch.manual_seed(0)
    model = Groups().eval()
    batchnorm.recalibrate(model, [images(256, 1)])
    data = images(256, 2).split(size)
    with torch.no_grad():
        batches = [{"x": x, "y": model(x)[:, 0]} for x in data]
    spoiled = copy.deepcopy(model)
    spoiled.bn.reset_running_stats()

    def loss(output, batch):
        return (output[:, 0] - batch["y"]).square().mean()

    def call(model, batch):
        return model(batch["x"])

    assert batchnorm.diagnose(model, batches, loss, forward=call).healthy
    result = batchnorm.diagnose(spoiled, batches, loss, forward=call)
    assert result.metrics.higher_is_better is False
    assert result.findings[0].layer == "bn"
