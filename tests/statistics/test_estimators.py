"""What each estimator computes, against formulas written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.statistics.estimators import ESTIMATORS, Estimator, Pooled, Within

EPS = torch.finfo(torch.float64).eps


def fed(estimator: type[Estimator], batches: list[Tensor]) -> Estimator:
    result = estimator(batches[0].shape[1])
    for batch in batches:
        result.add(Moments.of(batch))
    return result


cuts = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(cuts=cuts, seed=st.integers(0, 2**16), offset=st.sampled_from([0.0, 1.0, 1e4]))
def test_pooled_is_the_concatenation_whatever_the_cut(cuts: list[int], seed: int, offset: float) -> None:
    x = torch.randn(sum(cuts), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset
    mean, variance = fed(Pooled, list(x.split(cuts))).statistics()
    if len(x) == 1:
        assert variance.isnan().all()
        return
    # rounding of the mean, of each deviation, and one merge a batch
    scale = x.abs().max()
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=float(8 * len(x) * EPS * scale))
    torch.testing.assert_close(variance, x.var(0), rtol=8 * len(x) * EPS, atol=float(8 * len(x) * EPS * scale))


@given(cuts=cuts, seed=st.integers(0, 2**16))
def test_within_is_the_mean_over_batches_that_have_a_variance(cuts: list[int], seed: int) -> None:
    x = torch.randn(sum(cuts), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    batches = list(x.split(cuts))
    mean, variance = fed(Within, batches).statistics()
    enter = [b for b in batches if len(b) > 1]
    if not enter:
        assert mean.isnan().all()
        assert variance.isnan().all()
        return
    torch.testing.assert_close(mean, torch.stack([b.mean(0) for b in enter]).mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(variance, torch.stack([b.var(0) for b in enter]).mean(0), rtol=1e-13, atol=1e-13)


def test_within_is_algorithm_2_for_batches_of_one_size() -> None:
    torch.manual_seed(0)
    batches = list(torch.randn(5, 16, 4, dtype=torch.float64))
    _, variance = fed(Within, batches).statistics()
    m = 16
    expected = m / (m - 1) * torch.stack([b.var(0, correction=0) for b in batches]).mean(0)
    torch.testing.assert_close(variance, expected, rtol=1e-13, atol=0)


def test_pooled_is_within_plus_the_variance_between_batches() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 4, dtype=torch.float64) + shift for shift in range(5)]
    pooled = fed(Pooled, batches).pooled
    within = torch.stack([b.var(0, correction=0) for b in batches]).mean(0)
    between = torch.stack([b.mean(0) for b in batches]).var(0, correction=0)
    torch.testing.assert_close(pooled.variance(), within + between, rtol=1e-13, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS.values())
def test_channels_are_counted_one_by_one_under_a_mask(estimator: type[Estimator]) -> None:
    x = torch.tensor([[1.0, 2.0], [5.0, 4.0], [9.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    result = estimator(2)
    result.add(Moments.of(x, mask=mask))
    mean, variance = result.statistics()
    assert mean[0] == 5
    assert variance[0] == 16
    assert mean[1].isnan()
    assert variance[1].isnan()


@pytest.mark.parametrize("estimator", ESTIMATORS.values())
def test_nothing_met_is_not_a_number(estimator: type[Estimator]) -> None:
    assert all(t.isnan().all() for t in estimator(3).statistics())
