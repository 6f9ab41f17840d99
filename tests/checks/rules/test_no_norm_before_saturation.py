from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import batchnorm.nn
from batchnorm.checks import Finding, check


def findings(model: nn.Module, x: Tensor) -> list[Finding]:
    return check(model, x, select="BN003").findings


NORMED = [nn.Conv1d(3, 4, 1, bias=False), nn.BatchNorm1d(4), nn.ReLU()]
X = torch.randn(4, 3, 6)


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Hardtanh()], ids=repr)
@pytest.mark.parametrize("norm_first", [False, True])
def test_flagged_and_fixed(activation: nn.Module, norm_first: bool) -> None:
    bare = [nn.Conv1d(4, 4, 1), activation, nn.Conv1d(4, 3, 1)]
    model = nn.Sequential(*NORMED, *bare) if norm_first else nn.Sequential(nn.Conv1d(3, 4, 1), *bare, *NORMED)
    name = "3" if norm_first else "1"
    (finding,) = findings(model, X)
    assert finding.layer == name
    fixed = check(model, X, select="BN003").fix(unsafe=True)
    assert isinstance(fixed.model.get_submodule(f"{name}.norm"), batchnorm.nn.BatchNorm1d)
    assert findings(fixed.model, X) == []
    assert fixed.renamed == {f"{name}.weight": f"{name}.conv.weight"}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.value(x)) * (1 - torch.sigmoid(self.gate(x)).transpose(1, 2).transpose(1, 2))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv1d(4, 4, 1), nn.Sigmoid()],  # the output
        [nn.Conv1d(4, 4, 1), nn.Tanh(), nn.Flatten(), nn.Softmax(1)],
        [nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv1d(4, 1, 1)],
        [nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Conv1d(4, 1, 1)],
        [Gated(), nn.Conv1d(4, 1, 1)],
    ],
)
def test_not_flagged(layers: list[nn.Module]) -> None:
    assert findings(nn.Sequential(*NORMED, *layers), X) == []


def test_networks_without_norms_are_not_meant() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 4, 1), nn.Tanh(), nn.Conv1d(4, 1, 1))
    assert findings(model, X) == []


def test_a_norm_of_weights_is_no_norm_of_the_network() -> None:
    class Standardized(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            weight = nn.functional.batch_norm(self.weight.view(1, 4, -1), None, None, training=True).view_as(
                self.weight
            )
            return self._conv_forward(x, weight, self.bias)

    model = nn.Sequential(Standardized(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 4, 1), nn.Tanh(), nn.Conv1d(4, 1, 1))
    assert check(model.eval(), X).findings == []


def test_a_layer_that_cannot_be_wrapped_has_no_fix() -> None:
    layer = nn.Conv1d(4, 4, 1)
    model = nn.Sequential(*NORMED, layer, nn.Tanh(), layer, nn.Tanh(), nn.Conv1d(4, 1, 1))
    (finding,) = findings(model, X)
    assert finding.fix is None
    assert "called more than once" in finding.advice
