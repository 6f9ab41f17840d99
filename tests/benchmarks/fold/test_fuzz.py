from __future__ import annotations

import pytest
import torch
from benchmarks.fold.fuzz import check
from benchmarks.fold.random_models import random_model

SWEEP = [pytest.param(first, marks=pytest.mark.sweep) for first in range(20_010, 20_200, 10)]


@pytest.mark.parametrize("first", [20_000, *SWEEP])
def test_random_networks_compute_the_same_after_folding(first: int) -> None:
    folded = 0
    for seed in range(first, first + 10):
        gone, _, error, _ = check(seed)
        assert error < 1e-8, f"seed {seed}\n{random_model(seed)[0].describe()}"
        folded += gone
    assert folded > 2


def test_a_seed_gives_the_same_network_again() -> None:
    (one, shape), (other, _) = random_model(3), random_model(3)
    assert one.describe() == other.describe()
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(one(x.clone()), other(x.clone()), strict=True))
