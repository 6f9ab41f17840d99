"""The distance of two means and variances, by hand."""

from __future__ import annotations

import pytest
import torch

from batchnorm.diagnosis.distance import kl, layer_distance, squared_distance, typical


def test_distance_is_symmetric_and_infinite_where_something_is_broken() -> None:
    a, b = (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])), (torch.tensor([1.0, 1.0]), torch.tensor([4.0, 2.0]))
    assert torch.equal(squared_distance(*a, *b, 0.0), squared_distance(*b, *a, 0.0))
    # (0 − 1)²/2.5 + (½ log ¼)²
    expected = 1 / 2.5 + (0.5 * torch.tensor(0.25).log()) ** 2
    torch.testing.assert_close(squared_distance(*a, *b, 0.0)[0], expected)
    assert squared_distance(*a, *b, 0.0)[1] == 0
    for broken in (torch.nan, torch.inf, -1.0):
        variance = torch.tensor([1.0, broken])
        assert torch.isinf(squared_distance(a[0], variance, *b, 1e-5)[1])


def test_one_channel_counts_for_three_standard_deviations_at_most() -> None:
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    mean = torch.tensor([1.0, 100.0, 0.0]).double()
    variance = torch.tensor([1.0, 1.0, 1e12]).double()
    squared = squared_distance(mean, variance, zero, one, 0.0)
    # the shift of the last is none; of its scale ½ log 10¹² = 13.8 are left 9
    torch.testing.assert_close(squared, torch.tensor([1.0, 9.0, 9.0]).double())
    assert typical(squared) == pytest.approx((19 / 3) ** 0.5)
    assert layer_distance((mean, variance), (zero, one), 0.0) == typical(squared)


def test_eps_is_part_of_both_variances() -> None:
    zero = torch.zeros(1).double()
    assert float(squared_distance(zero + 2, zero, zero, zero, 1.0)) == 4.0
    assert float(kl(zero + 2, zero, zero, zero, 1.0)) == 4.0
    assert float(kl(zero, zero + 3, zero, zero, 1.0)) == 0.5 * (4 + 0.25 - 2)


def test_no_channels_are_no_distance_and_noise_taken_off_leaves_nothing_negative() -> None:
    assert typical(torch.zeros(0)) == 0.0
    assert typical(torch.tensor([-1.0, 0.5])) == 0.0
