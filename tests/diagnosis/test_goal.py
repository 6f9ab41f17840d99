"""The metric as the judge: which way is better, what is chance, and what is a fault by it."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.diagnosis.conftest import images
from torch import nn
from torch.nn import functional as F

import batchnorm


def accuracy(output, batch):
    return (output.argmax(1) == batch[1]).double().mean()


def error_rate(output, batch):
    return 1 - accuracy(output, batch)


def cross_entropy(output, batch):
    return F.cross_entropy(output, batch[1])


def squared(output, batch):
    return (output - batch[1]).square().mean()


def explained(output, batch):
    return 1 - (output - batch[1]).square().mean() / batch[1].var()


CLASSES, VALUES = (accuracy, error_rate, cross_entropy), (squared, explained)
HIGHER = {accuracy: True, error_rate: False, cross_entropy: False, squared: False, explained: True}


@pytest.fixture
def labelled(net, batches):
    """The batches with the classes that the network gives, and with its values."""

    with torch.no_grad():  # all classes, not one
        net.head.bias.sub_(net(torch.cat(batches)).mean(0))

    def made(metric, on=None):
        with torch.no_grad():
            outputs = [net(batch) for batch in batches]
        wanted = [out.argmax(1) if metric in CLASSES else out for out in outputs]
        return list(zip(on or batches, wanted, strict=True))

    return made


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


def test_a_metric_of_outputs_alone_judges_nothing(net, batches) -> None:
    net.bn3.reset_running_stats()
    result = batchnorm.diagnose(net, batches, lambda output, batch: output.std())
    assert result.metrics.higher_is_better is None
    assert result.findings[0].cause == "never_updated"


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


@pytest.mark.parametrize("metric", HIGHER, ids=lambda metric: metric.__name__)
def test_frozen_statistics_that_harm_are_a_fault(net, labelled, metric) -> None:
    batches = labelled(metric)
    for norm in (net.bn2, net.bn3, net.bn4):
        norm.running_mean.add_(1.5 * norm.running_var.sqrt())
    batchnorm.freeze(net)
    result = batchnorm.diagnose(net, batches, metric)
    assert not result.healthy
    assert result.findings[0].gain.closed > 0.5


def test_no_cure_is_told_that_makes_the_metric_worse(net, labelled, batches) -> None:
    """One norm is right to be off, another is poisoned."""
    net.bn2.running_mean.add_(2 * net.bn2.running_var.sqrt())
    made = labelled(accuracy)
    net.bn4.running_mean.add_(3 * net.bn4.running_var.sqrt())
    result = batchnorm.diagnose(net, made, accuracy)
    for finding in result.findings:
        assert finding.gain is None or finding.gain.metric_after >= finding.gain.metric_before
        assert finding.cure or "No cure is told" in finding.evidence


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


def test_a_shift_of_the_data_is_mended_where_the_metric_says(net, labelled, batches) -> None:
    inverted = labelled(accuracy, [1 - 2 * batch for batch in batches])
    finding = batchnorm.diagnose(net, inverted, accuracy).findings[0]
    assert finding.cause == "domain_shift"
    assert finding.cure.startswith("batches = [")
    assert finding.gain.metric_after > finding.gain.metric_before


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
