from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check

X = torch.randn(4, 3, 6, 6)


def findings(model: nn.Module, select: str | None = "norm-after-activation") -> list[Finding]:
    return check(model, X, select=select).findings


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.PReLU(), nn.LeakyReLU(0.2), nn.ELU(), nn.Mish()])
def test_flagged_if_asked_for_and_fixed(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), activation, nn.BatchNorm2d(4))
    (finding,) = findings(model)
    assert (finding.code, finding.layer) == ("BN015", "2")
    assert findings(model, None) == []
    fixed = check(model, X, select="BN015").fix(unsafe=True)
    assert [type(m) for m in fixed.model] == [nn.Conv2d, nn.BatchNorm2d, type(activation)]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()],
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.GELU(), nn.AvgPool2d(2), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.BatchNorm2d(4)],
        [nn.GELU(), nn.BatchNorm2d(3)],
    ],
)
def test_not_flagged(layers: list[nn.Module]) -> None:
    assert findings(nn.Sequential(*layers)) == []


class Mixer(nn.Module):
    """As ConvMixer is built: activation, then norm, in and between residual blocks."""

    def __init__(self, activation: nn.Module, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 2, 2), activation, nn.BatchNorm2d(8))
        self.spatial = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), activation, nn.BatchNorm2d(8)) for _ in range(depth)
        )
        self.mixing = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1), activation, nn.BatchNorm2d(8)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for spatial, mixing in zip(self.spatial, self.mixing, strict=True):
            x = mixing(x + spatial(x))
        return F.adaptive_avg_pool2d(x, 1)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_networks_designed_so_are_clean_unless_asked(activation: nn.Module, training: bool) -> None:
    model = Mixer(activation, 5)
    model(X)
    assert findings(model.train(training), None) == []
    assert len(findings(model)) == 11
