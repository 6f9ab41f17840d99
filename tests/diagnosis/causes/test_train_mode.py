from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm


def test_a_norm_left_in_train_mode(net, found) -> None:
    net.bn3.train()
    assert found(net) == [("train_mode", "bn3")]


def test_a_norm_without_running_statistics(net, found) -> None:
    bare = nn.BatchNorm1d(32, track_running_stats=False)
    bare.load_state_dict(dict(net.bn3.named_parameters()))
    net.bn3 = bare.eval()
    assert found(net)[0] == ("train_mode", "bn3")


def test_a_functional_norm_that_always_trains(net, found) -> None:
    class Always(nn.Module):
        def __init__(self, norm: nn.BatchNorm1d) -> None:
            super().__init__()
            self.register_buffer("running_mean", norm.running_mean.clone())
            self.register_buffer("running_var", norm.running_var.clone())

        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    net.bn3 = Always(net.bn3).eval()
    assert found(net)[0] == ("train_mode", "bn3")


def test_a_model_in_train_mode_is_one_that_its_user_is_training(net, found) -> None:
    assert found(net.train()) == []


@pytest.mark.parametrize("names", [None, "1"])
def test_a_model_whose_only_norm_keeps_no_statistics_is_diagnosed(names) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    result = batchnorm.diagnose(model, list(torch.randn(4, 16, 3)), names=names)
    assert [(finding.cause, finding.layer) for finding in result.findings] == [("train_mode", "1")]
    assert [left.name for left in result.left] == ["1"]
    assert "1 of 1 norms (1) keep no running statistics" in result.findings[0].evidence
