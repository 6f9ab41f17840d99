from __future__ import annotations

import pytest
import torch
from tests.diagnosis.conftest import images, settle
from torch import nn

import batchnorm


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))
            for _ in range(3)
        )

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return x.mean((2, 3))


@pytest.fixture
def net() -> Residual:
    torch.manual_seed(1)
    model = Residual()
    for block in model.blocks:
        nn.init.zeros_(block[4].weight)
    nn.init.uniform_(model.bn0.weight, 0.5, 1.5)
    return settle(model)


def test_zero_residual_norms_are_one_short_note(net, batches) -> None:
    result = batchnorm.diagnose(net, batches)
    assert result.healthy
    (note,) = result.notes
    assert (note.cause, len(note.layers), note.cure) == ("zero_init", 3, "")
    assert len(note.evidence) < 250


def test_a_beta_that_learnt_makes_dead_channels(net, batches) -> None:
    nn.init.ones_(net.blocks[1][4].bias)
    settle(net)
    result = batchnorm.diagnose(net, [images(64, seed) for seed in range(6)])
    assert ("dead_channels", "blocks.1.4") in [(f.cause, f.layer) for f in result.findings]
    assert all(len(f.cure) < 160 for f in result.findings)
