from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.dataflow.graph import Call
from batchnorm.dataflow.operator_kinds import activation_kind, family, fusible_activation, suppresses
from batchnorm.dataflow.trace import trace


def call_of(module: nn.Module) -> Call:
    # a clone first, for in-place activations must not write into the input
    return trace(nn.Sequential(nn.Flatten(0), module).eval(), torch.randn(2, 3)).calls[-1]


@pytest.mark.parametrize(
    "module",
    [
        *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.CELU(), nn.SiLU(), nn.GELU()),
        *(nn.Mish(), nn.Hardswish(), nn.PReLU(), nn.RReLU(), nn.Threshold(0.0, 0.0), nn.Hardtanh(0.0, 4.0)),
    ],
    ids=repr,
)
def test_rectifying(module: nn.Module) -> None:
    assert activation_kind(call_of(module)) == "rectifying"


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Hardtanh()], ids=repr)
def test_saturating(module: nn.Module) -> None:
    assert activation_kind(call_of(module)) == "saturating"


@pytest.mark.parametrize(
    "module", [nn.SELU(), nn.Softmax(0), nn.Softplus(), nn.Identity(), nn.Threshold(1.0, 0.5)], ids=repr
)
def test_neither(module: nn.Module) -> None:
    assert activation_kind(call_of(module)) is None


@pytest.mark.parametrize(
    ("module", "expected"),
    [(nn.ReLU(), True), (nn.ReLU6(), True), (nn.LeakyReLU(), False), (nn.GELU(), False), (nn.Hardtanh(), False)],
    ids=repr,
)
def test_what_sets_the_negative_half_to_zero(module: nn.Module, expected: bool) -> None:
    assert suppresses(call_of(module)) is expected


def test_clamps_at_zero_suppress() -> None:
    class Clamps(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x.clamp(min=0), x.clamp_min(0), x.clamp(min=1), x.clamp(max=0), x.clamp(min=x)]

    calls = trace(Clamps(), torch.randn(3)).calls
    assert [suppresses(call) for call in calls] == [True, True, False, False, False]


def test_in_place_operators_are_of_the_same_family() -> None:
    assert family(call_of(nn.ReLU(inplace=True))) == "relu"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        *((nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.ReLU6(), "relu6"), (nn.Hardtanh(0, 6), "relu6")),
        *((nn.LeakyReLU(), "leaky_relu"), (nn.Hardswish(), "hardswish"), (nn.SiLU(inplace=True), "silu")),
        *((nn.Sigmoid(), "sigmoid"), (nn.Tanh(), "tanh"), (nn.GELU(), "gelu"), (nn.Hardtanh(), None)),
        *(
            (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
            (nn.GELU(approximate="tanh"), None),
            (nn.ELU(), None),
            (nn.Linear(6, 2), None),
        ),
    ],
    ids=repr,
)
def test_what_the_fused_kernel_computes(module: nn.Module, expected: str | None) -> None:
    assert fusible_activation(call_of(module)) == expected
