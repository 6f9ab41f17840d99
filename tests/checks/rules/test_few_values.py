from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.checks import Finding, check


def findings(model: nn.Module, *shape: int) -> list[Finding]:
    return check(model, torch.randn(shape), select="BN014").findings


def net() -> nn.Sequential:
    stem = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("batch", [2, 3])
def test_the_one_behind_the_pooling_is_named(batch: int) -> None:
    (finding,) = findings(net(), batch, 3, 8, 8)
    assert (finding.layer, finding.fix) == ("5", None)
    assert f"{batch} values a channel (batch {batch} × space 1×1)" in finding.message


def test_two_values_give_plus_and_minus_gamma() -> None:
    norm = nn.BatchNorm1d(3, eps=1e-12)
    torch.testing.assert_close(norm(torch.tensor([[1.0, 5.0, -2.0], [2.0, -5.0, 70.0]])).abs(), torch.ones(2, 3))


def test_several_are_one_finding() -> None:
    (finding,) = findings(net(), 3, 3, 1, 1)
    assert finding.layer == ""
    assert "2 norms (1, 5) normalize over fewer than 4 values" in finding.message


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 3, 1, 1), (16, 3, 2, 2)])
def test_enough(shape: tuple[int, ...]) -> None:
    assert findings(net(), *shape) == []


def test_only_what_the_batch_normalizes_counts() -> None:
    assert findings(net().eval(), 2, 3, 8, 8) == []
    frozen = net()
    batchnorm.freeze(frozen)
    assert findings(frozen, 1, 3, 8, 8) == []
    assert findings(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 1, 3, 2, 2) == []
