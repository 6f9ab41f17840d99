from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.checks import Finding, check

X = torch.randn(4, 3, 6, 6)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, X, select="BN007").findings


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU())


@pytest.mark.parametrize(
    ("tensor", "value", "said"),
    [
        ("running_var", -1e-9, "Its running_var is negative in 1 of 4 channels (channel 2: -1e-09)."),
        ("running_var", float("inf"), "Its running_var is not finite in 1 of 4 channels (channel 2: inf)."),
        ("running_mean", float("nan"), "Its running_mean is not finite in 1 of 4 channels (channel 2: nan)."),
        ("weight", float("nan"), "Its weight is not finite in 1 of 4 channels (channel 2: nan)."),
        ("bias", -float("inf"), "Its bias is not finite in 1 of 4 channels (channel 2: -inf)."),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_message_tells_what_and_where(tensor: str, value: float, said: str, training: bool) -> None:
    model = net().train(training)
    getattr(model[1], tensor).data[2] = value
    (finding,) = findings(model)
    assert (finding.layer, finding.message, finding.fix) == ("1", said, None)


def test_everything_that_is_wrong_with_a_norm_is_one_finding() -> None:
    model = net()
    model[1].running_mean[:] = model[1].weight.data[1] = float("nan")
    model[1].running_var[0] = -1
    (finding,) = findings(model)
    assert "running_mean is not finite in 4 of 4" in finding.message
    assert "running_var is negative in 1 of 4" in finding.message
    assert "weight is not finite in 1 of 4" in finding.message
    assert finding.advice.startswith("Load the weights")


def test_zero_variances_negative_gammas_and_missing_tensors_are_valid() -> None:
    model = net()
    model[1].running_var.zero_()
    model[1].weight.data.fill_(-2)
    assert findings(model) == []
    assert findings(net(affine=False, track_running_stats=False)) == []


def test_the_advice_for_statistics_helps() -> None:
    model = net()
    model[1].running_var[0] = -1
    model[1].running_mean[1] = float("nan")
    (finding,) = findings(model.eval())
    assert "batchnorm.recalibrate(model, batches)" in finding.advice
    batchnorm.recalibrate(model, [torch.randn(8, 3, 6, 6) for _ in range(3)])
    assert findings(model) == []


def test_buffers_of_a_functional_norm_count() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.tensor([1.0, -1.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var)

    (finding,) = findings(Net())
    assert "running_var is negative in 1 of 3" in finding.message
