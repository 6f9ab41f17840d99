from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from batchnorm.models.float64 import float64_gamma
from batchnorm.travel.maps import Map


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_inverse_leads_back():
    scale, shift = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    map_ = Map.per_channel(scale, shift, 4)
    for both in (map_.then(map_.inverse()), map_.inverse().then(map_)):
        torch.testing.assert_close(both.scale, torch.ones(1, 5, 1, 1, dtype=torch.float64))
        torch.testing.assert_close(both.shift, torch.zeros(1, 5, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("weight", [None, randn(4, seed=1)])
@pytest.mark.parametrize("bias", [None, randn(4, seed=2)])
def test_the_map_of_a_norm_is_the_norm(weight, bias):
    mean, var, x = randn(4, seed=3), randn(4, seed=4).square(), randn(7, 4)
    map_ = Map.of_norm(mean, var, weight, bias, 0.01)
    expected = F.batch_norm(x, mean, var, weight, bias, False, 0.0, 0.01)
    # each side spends fewer than 8 operations on terms of these sizes
    size = map_.scale.abs() * (x.abs() + mean.abs()) + (0 if bias is None else bias.abs())
    assert ((map_.scale * x + map_.shift - expected).abs() <= 2 * float64_gamma(8) * size).all()


def test_the_map_of_a_norm_is_computed_in_float64():
    mean, var = torch.tensor([1e4]), torch.tensor([0.01])
    map_ = Map.of_norm(mean, var, None, torch.tensor([1.0]), 1e-5)
    assert map_.shift.dtype == torch.float64
    exact = 1.0 - 1e4 / (float(var) + 1e-5) ** 0.5
    assert abs(float(map_.shift) - exact) <= 2 * float64_gamma(8) * abs(exact)
