from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.checks import RULES, check
from batchnorm.errors import InputError, UnknownNameError


def faulty() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4)),
        *(nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
    )


def found(model: nn.Module, inputs: object, **options: object) -> list[tuple[str, str]]:
    return [(f.code, f.layer) for f in check(model, inputs, **options).findings]  # type: ignore[arg-type]


X = torch.randn(4, 3, 8, 8)


def test_findings_come_in_order_of_execution() -> None:
    assert found(faulty(), X) == [("BN001", "0"), ("BN002", "5"), ("BN004", "7")]
    assert found(faulty(), X, select=["BN004", "BN001"]) == [("BN001", "0"), ("BN004", "7")]
    assert found(faulty(), X, ignore="BN001") == [("BN002", "5"), ("BN004", "7")]


def test_the_model_is_left_as_it_was() -> None:
    model = faulty()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check(model, X)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in model.modules())


def test_functional_norms_and_activations_count() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(x)).clone()
            x = F.batch_norm(F.dropout(F.batch_norm(x, None, None, training=True)), self.mean, self.var)
            return self.linear(x.mean((2, 3)))

    net = Net().eval()
    result = check(net, X)
    assert [(f.code, f.layer, f.fix) for f in result.findings] == [
        ("BN002", "", None),
        ("BN005", "", None),
        ("BN004", "", None),
    ]


def test_a_shared_layer_is_reported_once() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    assert found(nn.Sequential(conv, norm, conv, norm), X) == [("BN001", "0")]


def test_a_healthy_network_has_no_findings() -> None:
    class Block(nn.Module):
        """Pre-activation, concatenated inputs, a gate: none of which is a fault."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2 * channels)
            self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1)
            self.squeeze, self.excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(F.relu(self.norm(torch.cat([x, F.relu(x)], 1))))
            gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
            return x + y * gate

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Block(4), Block(4), nn.Conv2d(4, 1, 1), nn.Sigmoid())
    assert found(model, X) == []


def test_the_result_is_text_and_data() -> None:
    result = check(faulty(), X)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["rules"] == [rule.code for rule in RULES if rule.by_default]
    assert data["findings"][0]["fix"] == {"description": "drop the bias; the running mean takes it over", "safe": True}
    text = str(result)
    assert "3 findings (BN001: 1, BN002: 1, BN004: 1)" in text
    assert "dropout-before-norm" in text
    assert "No findings" in str(check(nn.Sequential(nn.Conv2d(3, 4, 3)), X))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UnknownNameError):
        check(faulty(), X, select="BN999")
    with pytest.raises(InputError):
        check(faulty(), torch.randn(4, 5, 8, 8))
