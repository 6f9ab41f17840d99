"""Every rule on three architectures: it finds what was planted, and nothing else is found, there or without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import RULES, check

Norm: TypeAlias = "nn.BatchNorm1d | nn.BatchNorm2d"


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return F.adaptive_avg_pool2d(x, y.shape[2]) + y


class Kind:
    """The layers of one architecture, and the network around a unit from 8 channels to 8."""

    def __init__(self, name: str) -> None:
        self.flat, self.residual = name == "mlp", name == "residual"

    def layer(self, *, bias: bool = False, inputs: int = 8) -> nn.Module:
        return nn.Linear(inputs, 8, bias) if self.flat else nn.Conv2d(inputs, 8, 3, padding=1, bias=bias)

    def norm(self, **options: Any) -> Norm:
        return nn.BatchNorm1d(8, **options) if self.flat else nn.BatchNorm2d(8, **options)

    def net(self, unit: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        stem = [self.layer(inputs=3), self.norm(), nn.ReLU()]
        head = [] if self.flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        body = Residual(unit) if self.residual else unit
        model = nn.Sequential(*stem, body, nn.ReLU(), *head, nn.Linear(8, 2))
        with torch.no_grad():
            for _ in range(3):
                model(self.inputs())
        return model

    def inputs(self) -> Tensor:
        return torch.randn((16, 3) if self.flat else (16, 3, 8, 8))


KINDS = ("mlp", "conv", "residual")
PLANTED: dict[str, list[Callable[[Kind], nn.Module]]] = {}
MODES: dict[str, tuple[bool, ...]] = {}


def plant(code: str, *modes: bool) -> Callable[[Callable[[Kind], nn.Module]], Callable[[Kind], nn.Module]]:
    def note(unit: Callable[[Kind], nn.Module]) -> Callable[[Kind], nn.Module]:
        PLANTED.setdefault(code, []).append(unit)
        MODES[unit.__name__] = modes or (True, False)
        return unit

    return note


def clean(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), kind.norm())


@plant("BN001")
def bias(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(bias=True), kind.norm())


@plant("BN001")
def bias_before_an_average(kind: Kind) -> nn.Module:
    between = nn.Identity() if kind.flat else nn.AvgPool2d(2)
    return nn.Sequential(kind.layer(bias=True), between, kind.norm())


@plant("BN001")
def bias_before_a_maximum(kind: Kind) -> nn.Module:
    between = nn.Identity() if kind.flat else nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(kind.layer(bias=True), between, kind.norm())


@plant("BN001")
def bias_before_three_norms(kind: Kind) -> nn.Module:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norms = kind.layer(bias=True), nn.ModuleList(kind.norm() for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            return sum(norm(y) for norm in self.norms)

    return Three()


@plant("BN002")
def relu_and_pool_first(kind: Kind) -> nn.Module:
    between = nn.Dropout(0.0) if kind.flat else nn.MaxPool2d(2)
    return nn.Sequential(kind.layer(), nn.ReLU(), between, kind.norm())


@plant("BN002")
def relu_first(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), nn.ReLU(), kind.norm())


@plant("BN003")
def bare_sigmoid(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), nn.Sigmoid())


@plant("BN004")
def dropout_first(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), nn.Dropout(0.5), kind.norm())


@plant("BN005", False)
def left_in_training_mode(kind: Kind) -> nn.Module:
    unit = clean(kind)
    unit.train = lambda mode=True: unit  # type: ignore[assignment]
    return unit


@plant("BN006", False)
def statistics_never_kept(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), Broken(kind.norm(), lambda norm: norm.reset_running_stats()))


class Broken(nn.Module):
    """A norm that is changed when the mode is set: training before that would take it out again, or fail."""

    def __init__(self, norm: Norm, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.norm, self.change = norm, change

    def train(self, mode: bool = True) -> nn.Module:
        with torch.no_grad():
            self.change(self.norm)
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x)


@plant("BN007")
def negative_variance(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), Broken(kind.norm(), lambda norm: norm.running_var[3].fill_(-0.2)))


@plant("BN007")
def nan_variance(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), Broken(kind.norm(), lambda norm: norm.running_var[3].fill_(float("nan"))))


@plant("BN007")
def infinite_mean(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), Broken(kind.norm(), lambda norm: norm.running_mean[3].fill_(float("inf"))))


@plant("BN007")
def nan_gamma(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), Broken(kind.norm(), lambda norm: norm.weight[3].fill_(float("nan"))))


@plant("BN007")
def infinite_beta(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), Broken(kind.norm(), lambda norm: norm.bias[3].fill_(-float("inf"))))


@plant("BN008")
def keras_momentum(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), kind.norm(momentum=0.99))


@plant("BN008")
def impossible_momentum(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), kind.norm(momentum=-0.1))


@plant("BN008", True)
def no_momentum(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), kind.norm(momentum=0.0))


@plant("BN009")
def large_eps(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), kind.norm(eps=1.0))


@plant("BN009", False)
def no_eps(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), Broken(kind.norm(), lambda norm: setattr(norm, "eps", 0.0)))


@plant("BN010")
def two_norms(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), kind.norm(), nn.Identity(), kind.norm())


class Code(nn.Module):
    """Two layers with norms, called by a function."""

    def __init__(self, kind: Kind, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.last = kind.layer(), kind.layer(), kind.norm(), kind.norm()
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


@plant("BN012")
def one_norm_for_two_layers(kind: Kind) -> nn.Module:
    return Code(kind, lambda m, x: m.norm(m.two(F.relu(m.norm(m.one(x))))))


@plant("BN012")
def one_norm_for_two_branches(kind: Kind) -> nn.Module:
    return Code(kind, lambda m, x: m.norm(m.one(x)) + m.norm(m.two(x)))


def functional(m: Any, x: Tensor, **options: Any) -> Tensor:
    norm = m.last
    return F.batch_norm(m.one(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, **options)


@plant("BN013", True)
def functional_without_training(kind: Kind) -> nn.Module:
    return Code(kind, functional)


@plant("BN013", True)
def functional_never_in_training(kind: Kind) -> nn.Module:
    return Code(kind, lambda m, x: functional(m, x, training=False))


@plant("BN013", True)
def functional_always_in_training(kind: Kind) -> nn.Module:
    return Code(kind, lambda m, x: functional(m, x, training=True))


@plant("BN005", False)
def functional_in_training_in_eval_mode(kind: Kind) -> nn.Module:
    return Code(kind, lambda m, x: functional(m, x, training=True))


@plant("BN015")
def gelu_first(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), nn.GELU(), kind.norm())


@plant("BN015")
def leaky_first(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), nn.LeakyReLU(0.2), kind.norm())


@plant("BN015")
def prelu_first(kind: Kind) -> nn.Module:
    return nn.Sequential(kind.layer(), nn.PReLU(), kind.norm())


CASES = [
    pytest.param(code, unit, kind, mode, id=f"{code}-{unit.__name__}-{kind}-{'train' if mode else 'eval'}")
    for code, units in PLANTED.items()
    for unit in units
    for kind in KINDS
    for mode in MODES[unit.__name__]
]


@pytest.mark.every(6)
@pytest.mark.parametrize(("code", "unit", "name", "training"), CASES)
def test_what_was_planted_is_found_and_nothing_else(
    code: str, unit: Callable[[Kind], nn.Module], name: str, training: bool
) -> None:
    kind = Kind(name)
    model = kind.net(unit(kind)).train(training)
    (finding,) = check(model, kind.inputs(), select=["BN", code]).findings
    assert finding.code == code
    assert finding.layer.startswith("3")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_found_where_nothing_is_wrong(name: str, training: bool) -> None:
    kind = Kind(name)
    assert check(kind.net(clean(kind)).train(training), kind.inputs()).findings == []


@pytest.mark.parametrize("unit", [gelu_first, leaky_first, prelu_first])
@pytest.mark.parametrize("name", KINDS)
def test_the_order_that_is_a_choice_is_found_only_if_asked_for(unit: Callable[[Kind], nn.Module], name: str) -> None:
    kind = Kind(name)
    assert check(kind.net(unit(kind)), kind.inputs()).findings == []


@pytest.mark.parametrize("name", KINDS)
def test_few_values_are_found_in_training_mode(name: str) -> None:
    kind = Kind(name)
    model, few = kind.net(clean(kind)), kind.inputs()[:2] if name == "mlp" else torch.randn(3, 3, 1, 1)
    (finding,) = check(model, few).findings
    assert (finding.code, finding.layer) == ("BN014", "")
    assert "2 norms (1, 3" in finding.message
    assert check(model.eval(), few).findings == []


class Tokens(nn.Module):
    """Features of positions, (N, L, C), by three ways, and a norm that takes either axis for channels."""

    def __init__(self, name: str, *, turn: bool) -> None:
        super().__init__()
        self.name, self.turn = name, turn
        self.linear, self.embedding = nn.Linear(8, 8, bias=False), nn.Embedding(5, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8 if turn else 6)

    def features(self, x: Tensor) -> Tensor:
        if self.name == "mlp":
            return self.linear(F.relu(self.linear(x) * 2))
        if self.name == "embedding":
            return F.gelu(self.embedding(x[..., 0].abs().long().clamp(max=4)))
        if self.name == "lstm":
            return self.lstm(x)[0]
        x = self.linear(x)
        return x + self.linear(F.gelu(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.norm(x.transpose(1, 2)).transpose(1, 2) if self.turn else self.norm(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["mlp", "embedding", "lstm", "residual"])
def test_a_norm_over_positions_is_found_and_one_over_features_is_not(name: str, training: bool) -> None:
    x = torch.randn(4, 6, 8)
    for turn in (False, True):
        model = Tokens(name, turn=turn)
        model(x)
        found = check(model.train(training), x).findings
        assert [(f.code, f.layer) for f in found] == ([] if turn else [("BN011", "norm")])


def test_every_rule_is_planted() -> None:
    assert {rule.code for rule in RULES} == set(PLANTED) | {"BN011", "BN014"}  # those have tests of their own
