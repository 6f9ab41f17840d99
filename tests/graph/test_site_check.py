from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.graph import merge as merge_module
from batchnorm.graph.affine import LINEAR_OPERATORS, Affine
from batchnorm.graph.fold import fold

LAYERS = [
    (lambda: nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d, (2, 4, 5, 5)),
    (lambda: nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d, (2, 4, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
    (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
]


def make(layer, norm, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(layer(), norm(6), nn.Tanh(), nn.Flatten()).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    return net.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_rounding_of_the_merged_parameters_stays_within_the_bound(layer, norm, shape, dtype):
    for scale in (1e-3, 1.0, 1e3):
        result = fold(make(layer, norm, dtype), (torch.randn(shape) * scale).to(dtype))
        assert [f.norm for f in result.folded] == ["1"], result.left


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_a_merged_parameter_off_by_a_few_roundings_is_left(monkeypatch, layer, norm, shape, dtype, part):
    """Off by 64 roundings in one channel only: far below what an end-to-end comparison could see."""
    real = merge_module._parameter

    def off(value, like, requires_grad):
        is_weight = value.dim() > 1
        if is_weight is (part == "weight"):
            value = value * (1 + 64 * torch.finfo(dtype).eps * (torch.arange(value.shape[0]) == 1).double().view(
                -1, *[1] * (value.dim() - 1)))  # fmt: skip
        return real(value, like, requires_grad)

    monkeypatch.setattr(merge_module, "_parameter", off)
    x = torch.zeros(shape) if part == "bias" else torch.ones(shape)
    net = make(layer, norm, dtype)
    net[0].weight.data.abs_()
    net[0].bias.data.zero_()
    net[1].running_mean.zero_()
    if part == "weight":
        net[1].bias.data.zero_()
    result = fold(net, x.to(dtype))
    assert not result.folded
    assert "times the bound of its rounding" in result.left[0].reason


def test_one_bad_site_is_left_and_the_others_are_folded(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    net[3].weight.data.normal_()
    wrong = LINEAR_OPERATORS["conv2d"].spread  # along the first axis, which is the input's in a transposed convolution
    operators = {**LINEAR_OPERATORS}
    operators["conv_transpose2d"] = type(operators["conv2d"])("transposed convolution", 2, wrong)
    monkeypatch.setattr("batchnorm.graph.sites.LINEAR_OPERATORS", operators)
    result = fold(net, torch.randn(2, 3, 5, 5))
    assert [f.norm for f in result.folded] == ["1"]
    assert "errs by" in result.left[0].reason


def test_wrong_shift_is_caught(monkeypatch):
    real = Affine.of_norm
    monkeypatch.setattr(
        Affine, "of_norm", classmethod(lambda cls, *args: Affine((a := real(*args)).scale, a.shift + 1e-4))
    )
    result = fold(make(*LAYERS[0][:2]), torch.randn(LAYERS[0][2]))
    assert not result.folded
