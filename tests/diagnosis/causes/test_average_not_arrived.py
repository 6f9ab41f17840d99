from __future__ import annotations

import pytest

import batchnorm


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_a_mixture_of_initial_and_population_statistics(net, found, share: float) -> None:
    net.bn3.running_mean.mul_(share)
    net.bn3.running_var.mul_(share).add_(1 - share)
    assert found(net) == [("average_not_arrived", "bn3")]


def test_few_batches_counted(net, found) -> None:
    share = 1 - 0.9**4
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        norm.running_mean.mul_(share)
        norm.running_var.mul_(share).add_(1 - share)
        norm.num_batches_tracked.fill_(4)
    assert found(net)[0] == ("average_not_arrived", "bn1")


def test_a_recalibrated_model_counts_few_batches_and_is_healthy(net, found, home) -> None:
    batchnorm.recalibrate(net, home[:2])
    assert int(net.bn1.num_batches_tracked) == 2
    assert found(net) == []


def test_few_batches_counted_do_not_explain_every_gap(net, found, home) -> None:
    batchnorm.recalibrate(net, home)
    net.bn3.running_mean.add_(net.bn3.running_var.sqrt())
    assert found(net) == [("stale", "bn3")]
