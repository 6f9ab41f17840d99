from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from batchnorm.dataflow.linear_operators import LINEAR_OPERATORS, Affine
from batchnorm.models.float64 import float64_gamma


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weight", [None, randn(4, seed=1)])
@pytest.mark.parametrize("bias", [None, randn(4, seed=2)])
def test_is_the_norm(weight, bias):
    mean, var, x = randn(4, seed=3), randn(4, seed=4).square(), randn(7, 4)
    affine = Affine.of_norm(mean, var, weight, bias, 0.01)
    expected = F.batch_norm(x, mean, var, weight, bias, False, 0.0, 0.01)
    # each side spends fewer than 8 operations on terms of these sizes
    size = affine.scale.abs() * (x.abs() + mean.abs()) + (0 if bias is None else bias.abs())
    assert ((affine.scale * x + affine.shift - expected).abs() <= 2 * float64_gamma(8) * size).all()


def test_is_computed_in_float64():
    mean, var = torch.tensor([1e4]), torch.tensor([0.01])
    affine = Affine.of_norm(mean, var, None, torch.tensor([1.0]), 1e-5)
    assert affine.shift.dtype == torch.float64
    exact = 1.0 - 1e4 / (float(var) + 1e-5) ** 0.5
    assert abs(float(affine.shift) - exact) <= 2 * float64_gamma(8) * abs(exact)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(LINEAR_OPERATORS))
def test_absorbed_is_applied_after(name, groups):
    operator, n = LINEAR_OPERATORS[name], LINEAR_OPERATORS[name].trailing
    affine = Affine(randn(8, seed=1), randn(8, seed=2))
    if name == "linear":
        weight, x, kwargs = randn(8, 4, seed=3), randn(5, 4), {}
    elif "transpose" in name:
        weight, x, kwargs = randn(4, 8 // groups, *[3] * n, seed=3), randn(2, 4, *[4] * n), {"groups": groups}
    else:
        weight, x, kwargs = randn(8, 4 // groups, *[3] * n, seed=3), randn(2, 4, *[5] * n), {"groups": groups}
    bias = randn(8, seed=4)
    apply = getattr(F, name)
    channels = (1, 8, *[1] * n)
    for b in (bias, None):
        merged = operator.absorb(affine, weight, b, groups)
        expected = affine.scale.view(channels) * apply(x, weight, b, **kwargs) + affine.shift.view(channels)
        # a sum of products, and fewer than 8 further operations, on each side
        size = apply(x.abs(), weight.abs(), None if b is None else b.abs(), **kwargs)
        size = affine.scale.abs().view(channels) * size + affine.shift.abs().view(channels)
        bound = 2 * float64_gamma(weight.numel() + 8) * size
        assert ((apply(x, *merged, **kwargs) - expected).abs() <= bound).all()
        assert operator.channel_axis(expected.dim()) == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(LINEAR_OPERATORS))
def test_by_channel_gathers_what_one_factor_multiplies(name, groups):
    operator = LINEAR_OPERATORS[name]
    shape = (8, 8 // groups) if name.startswith("conv_transpose") else (8, 4)
    weight = torch.ones(*shape, *range(2, 2 + operator.trailing), dtype=torch.float64)
    factors = operator.spread(torch.arange(8.0, dtype=torch.float64), weight, groups) * weight
    channels = operator.by_channel(factors, groups)
    assert torch.equal(channels, torch.arange(8.0, dtype=torch.float64).unsqueeze(1).expand(8, weight.numel() // 8))
