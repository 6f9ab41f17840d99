"""This library's layers beside half-precision data fold as torch's do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(*, ours: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.BatchNorm2d(4)
    )
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    batchnorm.recalibrate(model, [X])
    return batchnorm.convert(model).model.eval() if ours else model.eval()


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["convert, then cast", "cast, then convert", "torch's"])
def test_folds_in_half_precision(dtype: torch.dtype, way: str) -> None:
    if way == "cast, then convert":
        model = batchnorm.convert(network(ours=False).to(dtype)).model
    else:
        model = network(ours=way != "torch's").to(dtype)
    statistics = {name: buffer.dtype for name, buffer in model.named_buffers()}
    x = X.to(dtype)
    result = batchnorm.fold(model, x)
    assert [item.norm for item in result.folded] == ["1", "4"], result
    assert result.error <= result.bound
    # against float64: rounding of weights and outputs, each with half of the type's spacing, through two layers
    truth = copy.deepcopy(model).double()(x.double())
    bound = 32 * torch.finfo(dtype).eps * truth.abs().max()
    assert (result.model(x).double() - truth).abs().max() <= bound
    back = result.unfold()
    assert {name: buffer.dtype for name, buffer in back.named_buffers()} == statistics
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.state_dict().items())
    assert len(batchnorm.fold(back, x).folded) == 2
