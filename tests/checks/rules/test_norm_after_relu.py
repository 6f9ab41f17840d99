from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import Finding, check


def findings(model: nn.Module) -> list[Finding]:
    return check(model, torch.randn(4, 3, 6, 6), select="BN002").findings


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0, 1)], ids=repr)
def test_flagged_and_fixed(relu: nn.Module) -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), relu, nn.BatchNorm2d(4)), nn.Conv2d(4, 1, 1))
    (finding,) = findings(model)
    assert finding.layer == "0.2"
    fixed = check(model, torch.randn(4, 3, 6, 6), select="BN002").fix(unsafe=True)
    assert [type(m) for m in fixed.model[0]] == [nn.Conv2d, nn.BatchNorm2d, type(relu)]
    assert fixed.model.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(4, 3, 6, 6)
    conv, _, norm = model[0]
    torch.testing.assert_close(fixed.model[0](x), relu(F.batch_norm(conv(x), None, None, norm.weight, norm.bias, True)))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()],
        [nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)],
        [nn.ReLU(), nn.BatchNorm2d(3)],
    ],
)
def test_not_flagged(layers: list[nn.Module]) -> None:
    assert findings(nn.Sequential(*layers)) == []


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)))


def test_concatenated_features_are_another_design() -> None:
    assert findings(Dense()) == []


class Code(nn.Module):
    def __init__(self, *, relu: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(F.relu(y) if self.relu is None else self.relu(y))


@pytest.mark.parametrize("relu", [False, True])
def test_an_order_that_code_decides_is_left_to_the_reader(relu: bool) -> None:
    (finding,) = findings(Code(relu=relu))
    assert (finding.layer, finding.fix) == ("norm", None)
    assert "between the layer and the activation" in finding.advice


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(list(self)):
            x = module(x)
        return x


@pytest.mark.parametrize(
    "model",
    [
        Backwards(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(3, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Identity(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU()), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), relu := nn.ReLU(), nn.BatchNorm2d(4), relu),
    ],
)
def test_modules_that_cannot_change_places_have_no_fix(model: nn.Module) -> None:
    (finding,) = findings(model)
    assert finding.fix is None


@pytest.mark.parametrize("between", [nn.MaxPool2d(2), nn.Dropout(0.5), nn.Sequential(nn.MaxPool2d(2), nn.Dropout2d())])
def test_maxima_and_dropout_between_do_not_hide_it(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), between, nn.BatchNorm2d(4))
    for training in (True, False):
        (finding,) = findings(model.train(training))
        assert (finding.layer, finding.fix) == ("3", None)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv(x)))
        return x + F.relu(self.norm(x))


def test_a_shortcut_around_the_norm_is_pre_activation() -> None:
    assert findings(PreActivation()) == []


@pytest.mark.parametrize(("norms", "slips", "code"), [(9, 0, "BN002"), (10, 0, "BN015"), (10, 2, "BN002")])
def test_an_order_kept_throughout_a_deep_network_is_a_design(norms: int, slips: int, code: str) -> None:
    after = [m for _ in range(norms) for m in (nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))]
    before = [m for _ in range(slips) for m in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())]
    model = nn.Sequential(*after, *before)
    found = check(model, torch.randn(4, 3, 6, 6), select=["BN002", "BN015"]).findings
    assert [f.code for f in found] == [code] * norms
