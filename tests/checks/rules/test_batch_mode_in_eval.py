from __future__ import annotations

import torch
from torch import nn

from batchnorm.checks import Finding, check
from batchnorm.nn.freeze import freeze

X = torch.randn(4, 3, 6, 6)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, X, select="BN005").findings


def net(**options: bool) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.BatchNorm2d(4))


def test_a_norm_left_in_training_mode_is_flagged_and_fixed() -> None:
    model = net().eval()
    model[3].train()
    (finding,) = findings(model)
    assert finding.layer == "3"
    fixed = check(model, X, select="BN005").fix(unsafe=True).model
    assert not any(m.training for m in fixed.modules())
    assert model[3].training
    with torch.no_grad():
        torch.testing.assert_close(fixed(X)[:1], fixed(X[:1]))


def test_a_norm_without_statistics_is_flagged_without_a_fix() -> None:
    (finding,) = findings(net(track_running_stats=False).eval())
    assert (finding.layer, finding.fix) == ("1", None)
    assert "keeps no running statistics" in finding.message
    assert "batchnorm.recalibrate" in finding.advice
    (finding,) = findings(net(track_running_stats=False, affine=False).eval())
    assert finding.layer == "1"


def test_a_model_in_training_mode_is_not_meant() -> None:
    assert findings(net()) == []
    assert findings(net(track_running_stats=False)) == []


def test_a_model_in_eval_mode_is_fine() -> None:
    assert findings(net().eval()) == []
    model = net()
    freeze(model)
    assert findings(model.eval()) == []
