from __future__ import annotations

import pytest
import torch
from tests.diagnosis.conftest import Net
from torch import nn

import batchnorm


def told(result) -> list[tuple[str, str]]:
    return [(note.cause, note.layer) for note in result.notes]


@pytest.mark.parametrize("zero", [(), ("bn2",), ("bn2", "bn4")])
def test_a_model_as_constructed_is_one_note(batches, zero) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    for name in zero:
        nn.init.zeros_(net.get_submodule(name).weight)
    result = batchnorm.diagnose(net, batches)
    assert result.healthy
    assert told(result) == [("untrained", "bn1")]
    assert len(result.notes[0].cure) < 120


@pytest.mark.parametrize("learnt", ["weight", "bias"])
def test_one_norm_that_has_learnt_is_no_untrained_model(batches, learnt: str) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.uniform_(getattr(net.bn3, learnt), 0.5, 1.5)
    result = batchnorm.diagnose(net, batches)
    assert [(f.cause, f.layer) for f in result.findings] == [("never_updated", "bn1")]


def test_norms_without_parameters_show_nothing(batches) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).eval()
    assert batchnorm.diagnose(model, batches).findings[0].cause == "never_updated"
