from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from batchnorm.checks.bias_proof import BiasProof
from batchnorm.dataflow.trace import trace

PAIRS = {
    "conv": (nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6), (4, 4, 5, 5)),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (4, 4, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), (8, 4)),
    "no statistics": (nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6, track_running_stats=False), (4, 4, 5)),
}


def proof(kind: str, *, training: bool, dtype: torch.dtype, offset: float) -> str | None:
    torch.manual_seed(0)
    layer, norm, shape = copy.deepcopy(PAIRS[kind])
    before = nn.Sequential(layer, norm).to(dtype).train(training)
    nn.init.normal_(layer.bias, std=10)
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean, std=10)
        nn.init.uniform_(norm.running_var, 0.01, 4)
    after = copy.deepcopy(before)
    if norm.running_mean is not None:
        after[1].running_mean.sub_(layer.bias.detach() * (1 + offset))
    after[0].bias = None
    watching = BiasProof(before, after, "0", "1")
    trace(after, torch.randn(shape, dtype=dtype), observer=watching)
    return watching.problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_a_right_move_is_proved(kind: str, training: bool, dtype: torch.dtype) -> None:
    assert proof(kind, training=training, dtype=dtype, offset=0) is None


@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
def test_a_move_that_is_off_by_a_few_roundings_is_not(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        found = proof(kind, training=False, dtype=dtype, offset=64 * torch.finfo(dtype).eps)
        assert found is not None
        assert "times the bound of its rounding" in found
