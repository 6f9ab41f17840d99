from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check


class Net(nn.Module):
    def __init__(self, forward: Any, *, measured: bool = True) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.randn(3) if measured else torch.zeros(3))
        self.register_buffer("var", torch.rand(3) + 1 if measured else torch.ones(3))
        self.inner = nn.BatchNorm2d(3)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, torch.randn(4, 3, 6, 6), select="BN013").findings


@pytest.mark.parametrize("options", [{}, {"training": False}])
def test_statistics_that_are_never_taken_in(options: dict[str, bool]) -> None:
    (finding,) = findings(Net(lambda net, x: F.batch_norm(x, net.mean, net.var, **options), measured=False))
    assert "training=False in training mode: it normalizes by mean 0 and variance 1" in finding.message
    assert (finding.advice, finding.fix) == ("Pass training=self.training to batch_norm.", None)


def test_a_trained_gamma_on_fixed_statistics() -> None:
    model = Net(lambda net, x: F.batch_norm(x, net.mean, net.var, net.gamma, net.beta))
    (finding,) = findings(model)
    assert "by what is stored" in finding.message
    model.requires_grad_(False)
    assert findings(model) == []  # a frozen norm


def test_training_that_is_always_on_is_found_in_either_mode() -> None:
    model = Net(lambda net, x: F.batch_norm(x, net.mean, net.var, training=True))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (finding,) = findings(model)
    assert "training=True in eval mode, too" in finding.message
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert findings(model.eval()) == []
    assert [f.code for f in check(model, torch.randn(4, 3, 6, 6)).findings] == ["BN005"]


def test_a_model_that_does_not_run_in_eval_mode_is_looked_at_in_training_mode() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        if not net.training:
            raise RuntimeError("for training only")
        return F.batch_norm(x, net.mean, net.var, training=True)

    assert findings(Net(forward)) == []


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: F.batch_norm(x, net.mean, net.var, net.gamma, net.beta, training=net.training),
        lambda net, x: F.batch_norm(x, net.mean, net.var),  # nothing is trained: frozen
        lambda net, x: F.batch_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3)), net.gamma),  # code has its own statistics
        lambda net, x: F.batch_norm(x, None, None, training=True),
        lambda net, x: net.inner(x),
    ],
)
def test_not_flagged(forward: Any) -> None:
    assert findings(Net(forward)) == []
    assert findings(Net(forward).eval()) == []


def test_a_part_in_eval_mode_is_meant_to_be() -> None:
    inner = Net(lambda net, x: F.batch_norm(x, net.mean, net.var, net.gamma))
    assert len(findings(nn.Sequential(inner))) == 1
    assert findings(nn.Sequential(inner.eval())) == []
