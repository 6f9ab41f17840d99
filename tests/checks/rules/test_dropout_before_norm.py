from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check

X = torch.randn(4, 3, 6, 6)


def findings(model: nn.Module) -> list[Finding]:
    return check(model, X, select="BN004").findings


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "dropout",
    [nn.Dropout(0.1), nn.Dropout(inplace=True), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()],
    ids=repr,
)
def test_flagged_and_fixed(dropout: nn.Module, training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), dropout, nn.BatchNorm2d(4), nn.ReLU()).train(training)
    (finding,) = findings(model)
    assert finding.layer == "2"
    assert f"p = {dropout.p:g}" in finding.message
    fixed = check(model, X, select="BN004").fix(unsafe=True).model
    assert [type(m) for m in fixed] == [nn.Conv2d, nn.BatchNorm2d, type(dropout), nn.ReLU]
    assert findings(fixed) == []


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()],
        [nn.Dropout(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.Dropout(0.0), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.Dropout(1e-4), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.Dropout().eval(), nn.BatchNorm2d(4)],
    ],
)
def test_not_flagged(layers: list[nn.Module]) -> None:
    model = nn.Sequential(*layers)
    if isinstance(layers[1], nn.Dropout) and not layers[1].training:

        class Off(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(x, training=False)

        model[1] = Off()
    assert findings(model) == []


class Code(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.dropout(x, 0.25, self.training))


@pytest.mark.parametrize("training", [False, True])
def test_functional_dropout_has_no_fix(training: bool) -> None:
    (finding,) = findings(Code().train(training))
    assert (finding.layer, finding.fix) == ("norm", None)
    assert "dropout (p = 0.25)" in finding.message
