"""Norms beside linear operators that read the same: x + norm(x) and its relatives."""

import copy

import pytest
import torch
from tests.lively import lively
from tests.wired import Wired
from torch import nn
from torch.nn import functional as F

from batchnorm import fold, refold, unfold
from batchnorm.absorbers.table import ABSORBERS


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branches(conv, norm=None, wiring=lambda m, x: torch.tanh(m.conv(x) + m.bn(x)), **more):
    torch.manual_seed(0)
    model = lively(Wired(wiring, conv=conv, bn=nn.BatchNorm2d(4) if norm is None else norm, **more))
    for name, module in model.named_modules():
        if name == "bn" or name.startswith("bn"):
            module.weight.data[0] = 0.0
            module.weight.data[1] = -1.5
    return model


def assert_folded(model, x, *, left=0, beside=1):
    """Fold as a module and as a program, and go all ways back."""
    before, others = copy.deepcopy(model.state_dict()), randn(*x.shape, seed=7).to(x)
    result = fold(model, x)
    assert len(result.left) == left, [str(item) for item in result.left]
    assert [item.way for item in result.folded].count("beside") == beside
    assert result.error_float64 is not None
    assert result.error_float64 < 1e-12
    with torch.no_grad():
        torch.testing.assert_close(result.model(others), model(others), atol=1e-4, rtol=1e-4)
        original = unfold(result.model, result.pairs)
        assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
        again = refold(original, result.pairs)
        again.load_state_dict(result.model.state_dict())
        assert torch.equal(again(others), result.model(others))
        program = fold(torch.export.export(model, (x,)))
        assert len(program.left) == left
        torch.testing.assert_close(program.model.module()(x), model(x), atol=1e-4, rtol=1e-4)
    return result


X = randn(2, 4, 7, 7)


@pytest.mark.every(4)
@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": (1, 5), "padding": (0, 2)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 1, "padding": "valid"},
    ],
    ids=str,
)
def test_convolutions_of_every_placement_that_has_a_middle_tap(groups, bias, settings):
    result = assert_folded(branches(nn.Conv2d(4, 4, groups=groups, bias=bias, **settings)), X)
    assert "into the middle of the kernel" in result.folded[0].sentence
    assert result.folded[0].into == "conv"
    assert isinstance(result.model.bn, nn.Identity)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolutions(groups):
    assert_folded(branches(nn.ConvTranspose2d(4, 4, 3, padding=1, groups=groups)), X)
    assert_folded(branches(nn.ConvTranspose2d(4, 4, 1, groups=groups, bias=False)), X)


def test_one_and_three_dimensions_and_linear_layers():
    assert_folded(branches(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)), randn(2, 4, 9))
    assert_folded(branches(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4)), randn(2, 4, 3, 4, 5))
    assert_folded(branches(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), randn(8, 4))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (2, 3), padding=(0, 1)),
        nn.Conv2d(4, 1, 1),  # broadcast over the channels
        nn.Conv2d(4, 4, 3, padding=2),
    ],
    ids=str,
)
def test_operators_of_another_shape_cannot(conv):
    def wiring(m, x):
        y, z = m.conv(x), m.bn(x)
        h, w = min(y.shape[2], z.shape[2]), min(y.shape[3], z.shape[3])
        return torch.tanh(y[:, :, :h, :w] + z[:, :, :h, :w])

    assert [item.norm for item in fold(branches(conv, wiring=wiring), X).left] == ["bn"]


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 4, padding="same"), nn.Conv2d(4, 4, 1, stride=1, padding=0)])
def test_an_even_kernel_has_no_middle(conv):
    model = branches(conv)
    if conv.kernel_size == (1, 1):
        assert_folded(model, X)
        return
    reason = fold(model, X).left[0].reason
    assert "Nor can what it is added to: no tap of conv2d in conv reads the very element that it computes." in reason


def test_a_strided_convolution_of_a_single_pixel_cannot():
    model = branches(nn.Conv2d(4, 4, 3, stride=2, padding=1))
    result = fold(model, randn(2, 4, 1, 1))
    assert "no tap of conv2d in conv" in result.left[0].reason


FACTORS = {
    "the norm's": lambda m, x: torch.tanh(m.conv(x) + 2 * m.bn(x)),
    "the convolution's": lambda m, x: torch.tanh(m.conv(x) * 0.5 - m.bn(x)),
    "parameters": lambda m, x: torch.tanh(m.gamma * m.conv(x) + m.bn(x)),
    "of the whole": lambda m, x: x + m.gamma * (m.conv(x) - m.bn(x)),
    "alpha": lambda m, x: torch.tanh(torch.add(m.conv(x), m.bn(x), alpha=3)),
    "division": lambda m, x: torch.tanh(m.bn(x) / 4 - (-m.conv(x))),
    "in place": lambda m, x: torch.tanh(m.conv(x).add_(m.bn(x))),
    "a sum of four": lambda m, x: torch.tanh(0 + m.conv(x) + m.other(x) + m.bn(x) + x),
    "dropout that is off": lambda m, x: torch.tanh(
        m.conv(x) + F.dropout(m.bn(F.dropout(x, training=False)), training=False)
    ),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("wiring", FACTORS.values(), ids=FACTORS.keys())
def test_factors_on_either_way_to_the_sum(wiring):
    model = branches(nn.Conv2d(4, 4, 3, padding=1), wiring=wiring, other=nn.Conv2d(4, 4, 1))
    model.register_parameter("gamma", nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]).view(4, 1, 1)))
    assert_folded(model, X)


def test_no_operator_that_is_multiplied_by_zero():
    model = branches(nn.Conv2d(4, 4, 3, padding=1), wiring=FACTORS["parameters"])
    model.register_parameter("gamma", nn.Parameter(torch.tensor([1.0, -2.0, 0.0, 3.0]).view(4, 1, 1)))
    assert "multiplied by zero before the sum" in fold(model, X).left[0].reason


OTHERS = {
    "the norm's output is returned": lambda m, x: (m.conv(x) + (y := m.bn(x)), y),
    "the convolution's output is returned": lambda m, x: ((y := m.conv(x)) + m.bn(x), y),
    "an activation stands between": lambda m, x: m.conv(x) + torch.sigmoid(m.bn(x)),
    "an activation stands behind the convolution": lambda m, x: m.conv(x).sigmoid() + m.bn(x),
    "they are multiplied": lambda m, x: m.conv(x) * m.bn(x),
    "the convolution reads something else": lambda m, x: torch.tanh(m.conv(x.tanh()) + m.bn(x)),
    "they do not meet": lambda m, x: (m.conv(x), m.bn(x)),
    "the convolution runs twice": lambda m, x: torch.tanh(m.conv(x) + m.bn(x)) + m.conv(x.tanh()),
    "their sum is written over the input": lambda m, x: torch.tanh(m.bn(x).add_(m.conv(x))) + x,
}


@pytest.mark.every(3)
@pytest.mark.parametrize("wiring", OTHERS.values(), ids=OTHERS.keys())
def test_where_others_would_notice_the_norm_stays(wiring):
    model = branches(nn.Conv2d(4, 4, 3, padding=1), wiring=wiring)
    result = fold(model, X)
    assert [item.norm for item in result.left] == ["bn"]
    others = randn(2, 4, 7, 7, seed=3)
    torch.testing.assert_close(result.model(others), model(others))


def test_a_block_that_is_called_twice():
    def wiring(m, x):
        for _ in range(2):
            x = torch.tanh(m.conv(x) + m.bn(x))
        return x

    assert_folded(branches(nn.Conv2d(4, 4, 3, padding=1), wiring=wiring), X)


def test_a_norm_called_twice_beside_two_convolutions_stays():
    def wiring(m, x):
        return torch.tanh(m.conv(x) + m.bn(x)) + torch.tanh(m.other(x) + m.bn(x))

    result = fold(branches(nn.Conv2d(4, 4, 1), wiring=wiring, other=nn.Conv2d(4, 4, 1)), X)
    assert [item.norm for item in result.left] == ["bn"]


def repvgg(kernel=3, groups=1):
    """Return two blocks of three branches, each with its norm, behind a stem that ends in a ReLU."""

    def block():
        return Wired(
            lambda m, x: torch.relu(m.n3(m.c3(x)) + m.n1(m.c1(x)) + m.n0(x)),
            c3=nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=groups, bias=False),
            n3=nn.BatchNorm2d(4),
            c1=nn.Conv2d(4, 4, 1, groups=groups, bias=False),
            n1=nn.BatchNorm2d(4),
            n0=nn.BatchNorm2d(4),
        )

    torch.manual_seed(0)
    return lively(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), block(), block()))


@pytest.mark.parametrize("groups", [1, 4])
def test_blocks_of_three_branches(groups):
    result = assert_folded(repvgg(groups=groups), randn(2, 4, 9, 9), beside=2)
    assert "beside" in [item["way"] for item in result.to_dict()["folded"]]


def test_channels_last_kernels_stay_so():
    model = repvgg().to(memory_format=torch.channels_last)
    folded = fold(model, randn(2, 4, 9, 9).to(memory_format=torch.channels_last)).model
    for name in ("2.c3", "3.c3"):
        assert folded.get_submodule(name).weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    model = branches(nn.Conv2d(4, 4, 3, padding=1)).to(dtype)
    result = fold(model, X.to(dtype))
    assert not result.left
    assert result.error <= result.bound


def test_a_norm_whose_input_is_far_larger_than_its_output_stays_rather_than_lose_digits():
    model = branches(nn.Conv2d(4, 4, 1), wiring=lambda m, x: m.conv(x) + m.bn(x))
    model.bn.running_mean.zero_()
    model.bn.running_var.fill_(1e12)
    model.conv.weight.data.mul_(1e-6)
    x = X * 1e6
    result = fold(model, x)
    assert [item.norm for item in result.left] == ["bn"]
    torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("operator", ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_the_kernel_with_an_identity_adds_it(operator, groups, taps):
    n = int(operator[-2])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6 // groups, *[taps] * n, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 6, *[5] * n, generator=generator, dtype=torch.float64)
    s, t = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    run = getattr(F, operator)
    merged, bias = ABSORBERS[f"aten::{operator}"].absorb_beside(s, t, weight, None)
    shape = (1, 6, *[1] * n)
    expected = run(x, weight, padding=taps // 2, groups=groups) + s.view(shape) * x + t.view(shape)
    torch.testing.assert_close(run(x, merged, bias, padding=taps // 2, groups=groups), expected)
