from __future__ import annotations

import pytest
import torch
from tests.diagnosis.conftest import settle

import batchnorm
from batchnorm.diagnosis.gaps import TOLERANCE


def norms_of(net) -> list:
    return [net.bn1, net.bn2, net.bn3, net.bn4]


@pytest.mark.every(3)
@pytest.mark.parametrize("names", [("bn1",), ("bn3",), ("bn1", "bn2", "bn3", "bn4")])
def test_weights_that_moved_under_a_cumulative_average(net, found, names) -> None:
    for name in names:
        norm = net.get_submodule(name)
        norm.momentum = None
        norm.reset_running_stats()
        feeder = net.get_submodule(name.replace("bn", "conv" if name in ("bn1", "bn2") else "fc"))
        with torch.no_grad():
            feeder.weight.mul_(4)
        settle(net)
        with torch.no_grad():
            feeder.weight.div_(4)
    settle(net, steps=60)
    assert found(net)[0] == ("cumulative_average", names[0])


def test_a_cumulative_average_of_weights_that_stood_still_is_nothing(net, found) -> None:
    for norm in norms_of(net):
        norm.momentum = None
        norm.reset_running_stats()
    assert found(settle(net, steps=20)) == []


def test_a_gap_that_a_moving_average_may_have_is_doubtful_in_a_cumulative_one(net, batches, monkeypatch) -> None:
    monkeypatch.setattr("batchnorm.diagnosis.gaps._threshold", lambda layers: TOLERANCE)  # none fits conspicuously well
    for norm in norms_of(net):
        norm.running_mean += 0.15 * norm.running_var.sqrt()
    moving = batchnorm.diagnose(net, batches)
    for norm in norms_of(net):
        norm.momentum = None
    (finding,) = batchnorm.diagnose(net, batches).findings
    assert moving.healthy
    assert (finding.cause, finding.layer, finding.severity) == ("cumulative_average", "bn1", "doubtful")
