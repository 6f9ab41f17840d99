"""The proof sees what an end-to-end comparison cannot, and leaves what fails, alone."""

from __future__ import annotations

import pytest
import torch
from tests.folding.lively_models import lively
from torch import nn

from batchnorm.absorbers.convolution import Convolution
from batchnorm.absorbers.transposed_convolution import TransposedConvolution
from batchnorm.folding.fold import fold
from batchnorm.folding.writing import rewrite as rewrite_module
from batchnorm.travel.maps import Map

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


@pytest.mark.every(4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_what_is_right_is_within_the_bounds(layer, norm, shape, dtype):
    for scale in (1e-3, 1.0, 1e3):
        result = fold(make(layer, norm, dtype), (torch.randn(shape) * scale).to(dtype))
        assert [f.norm for f in result.folded] == ["1"], result.left


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_a_parameter_that_is_not_rounded_to_the_nearest_number_is_left(monkeypatch, layer, norm, shape, dtype):
    """Off by 4 roundings in one channel only: far below what an end-to-end comparison could see."""
    real = rewrite_module._stored

    def off(value, like):
        data = real(value, like)
        data.view(-1)[1] *= 1 + 4 * torch.finfo(dtype).eps
        return data

    monkeypatch.setattr(rewrite_module, "_stored", off)
    result = fold(make(layer, norm, dtype), torch.ones(shape).to(dtype))
    assert not result.folded
    assert "is not the nearest number" in result.left[0].reason


def test_one_bad_site_is_left_and_the_others_are_folded(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    net[3].weight.data.normal_()
    # along the first axis, which is the input's in a transposed convolution
    monkeypatch.setattr(TransposedConvolution, "spread", Convolution.spread)
    result = fold(net, torch.randn(2, 3, 5, 5))
    assert [f.norm for f in result.folded] == ["1"]
    assert "errs by" in result.left[0].reason


def test_wrong_shift_is_caught(monkeypatch):
    real = Map.of_norm
    monkeypatch.setattr(Map, "of_norm", classmethod(lambda cls, *args: Map((m := real(*args)).scale, m.shift + 1e-6)))
    result = fold(make(*LAYERS[0][:2]), torch.randn(LAYERS[0][2]))
    assert not result.folded
    assert "more than float64 explains" in result.left[0].reason


class InItsOwnType(nn.Module):
    """A model that does not run in float64: it names a type in its code."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)).float())


def test_a_model_that_does_not_run_in_float64_is_compared_in_its_own_types():
    net = lively(InItsOwnType()).float()
    result = fold(net, torch.randn(2, 3, 8, 8))
    assert [norm.norm for norm in result.folded] == ["bn"]
    assert result.error_float64 is None


def test_in_its_own_types_too_a_wrong_fold_is_found(monkeypatch):
    monkeypatch.setattr(Convolution, "spread", lambda self, scale, weight, groups: scale.flip(0).reshape(-1, 1, 1, 1))
    result = fold(lively(InItsOwnType()).float(), torch.randn(2, 3, 8, 8))
    assert not result.folded
    assert "errs by" in result.left[0].reason


class Zeros(nn.Module):
    """What a fold does wrong only shows up where the inputs are not all zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_a_wrong_fold_that_the_example_hides_is_found_on_random_inputs(monkeypatch):
    monkeypatch.setattr(Convolution, "spread", lambda self, scale, weight, groups: scale.flip(0).reshape(-1, 1, 1, 1))
    result = fold(lively(Zeros()), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    assert not result.folded
    assert "errs by" in result.left[0].reason


def test_whether_random_inputs_were_compared_is_told():
    class Two(Zeros):
        def forward(self, x):
            return self.bn(self.conv(x)) if float(x.sum()) == 0 else self.conv(x)

    zeros = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    assert fold(lively(Zeros()), zeros).on_random_inputs is True
    left = fold(lively(Two()), zeros)
    assert left.on_random_inputs is None
    assert "but not with random inputs" in left.left[0].reason
    assert fold(nn.Linear(3, 3), torch.randn(2, 3)).on_random_inputs is None


class Caching(nn.Module):
    """Computes something in its first call, and keeps it until its types change."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.bias = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Parameter(torch.randn(3))
        self.kept = None

    def _apply(self, *args, **kwargs):
        self.kept = None
        return super()._apply(*args, **kwargs)

    def forward(self, x):
        if self.kept is None:
            self.kept = (self.bias * 2).detach().view(-1, 1, 1)
        return self.bn(self.conv(x + self.kept))


def test_what_a_model_keeps_from_its_first_call_is_computed_before_the_values_are_compared():
    result = fold(lively(Caching()), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert [norm.norm for norm in result.folded] == ["bn"]
    assert result.on_random_inputs is True
