"""Weighted sums absorb a map of their output: their own channels, by any number of groups."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from batchnorm.absorbers.linear_operator import LinearOperator
from batchnorm.absorbers.table import ABSORBERS
from batchnorm.models.float64 import float64_gamma

OPERATORS = {row.name: row for row in ABSORBERS.values() if isinstance(row, LinearOperator)}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_absorbed_is_applied_after(name, groups):
    operator, n = OPERATORS[name], OPERATORS[name].trailing
    scale, shift = randn(8, seed=1), randn(8, seed=2)
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
        merged = operator.absorb_output(scale, shift, weight, b, groups)
        expected = scale.view(channels) * apply(x, weight, b, **kwargs) + shift.view(channels)
        # a sum of products, and fewer than 8 further operations, on each side
        size = apply(x.abs(), weight.abs(), None if b is None else b.abs(), **kwargs)
        size = scale.abs().view(channels) * size + shift.abs().view(channels)
        bound = 2 * float64_gamma(weight.numel() + 8) * size
        assert ((apply(x, *merged, **kwargs) - expected).abs() <= bound).all()
        assert operator.channel_axis(expected.dim()) == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_by_channel_gathers_what_one_factor_multiplies(name, groups):
    operator = OPERATORS[name]
    shape = (8, 8 // groups) if name.startswith("conv_transpose") else (8, 4)
    weight = torch.ones(*shape, *range(2, 2 + operator.trailing), dtype=torch.float64)
    factors = operator.spread(torch.arange(8.0, dtype=torch.float64), weight, groups) * weight
    channels = operator.by_channel(factors, groups)
    assert torch.equal(channels, torch.arange(8.0, dtype=torch.float64).unsqueeze(1).expand(8, weight.numel() // 8))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_absorbed_is_applied_before(name, groups):
    operator, n = OPERATORS[name], OPERATORS[name].trailing
    scale, shift = randn(4, seed=1), randn(4, seed=2)
    kwargs = {} if name == "linear" else {"groups": groups}
    if "transpose" in name:
        shift = torch.zeros_like(shift)  # which cannot cross it: its outputs are sums of different numbers of terms
        weight, x = randn(4, 8 // groups, *[3] * n, seed=3), randn(2, 4, *[4] * n)
    else:
        weight, x = randn(8, 4 // groups if kwargs else 4, *[3] * n, seed=3), randn(2, 4, *[5] * n)
    apply, channels = getattr(F, name), (1, 4, *[1] * n)
    for bias in (randn(8, seed=4), None):
        merged = operator.absorb_input(scale, shift, weight, bias, groups if kwargs else 1)
        expected = apply(scale.view(channels) * x + shift.view(channels), weight, bias, **kwargs)
        size = apply((scale.view(channels) * x).abs() + shift.abs().view(channels), weight.abs(), None, **kwargs)
        bound = 2 * float64_gamma(weight.numel() + 8) * (size + 1 + (0 if bias is None else bias.abs().max()))
        assert ((apply(x, *merged, **kwargs) - expected).abs() <= bound).all()
