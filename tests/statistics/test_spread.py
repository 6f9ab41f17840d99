"""Standard errors against the scatter of many repetitions, and against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch

from batchnorm.moments import Moments
from batchnorm.statistics.spread import MOST_GROUPS, Spread


def _spread(batches):
    spread = Spread()
    for index, batch in enumerate(batches):
        spread.add(Moments.of(batch), index)
    return spread


def test_one_batch_tells_nothing():
    mean, variance = _spread([torch.randn(8, 3)]).standard_errors()
    assert mean.tolist() == [math.inf] * 3
    assert variance.tolist() == [math.inf] * 3


def test_no_batch_gives_no_channels():
    assert [e.numel() for e in Spread().standard_errors()] == [0, 0]


def test_equal_batches_give_the_textbook_error():
    batches = torch.randn(10, 16, 2, dtype=torch.float64)
    mean, _ = _spread(batches).standard_errors()
    expected = batches.mean(1).std(0) / math.sqrt(10)
    torch.testing.assert_close(mean, expected)


@pytest.mark.sweep
def test_errors_are_those_of_many_repetitions():
    """Values of one sample share an offset, so that there are far fewer independent values than values."""
    generator = torch.Generator().manual_seed(0)
    means, variances, mean_errors, variance_errors = [], [], [], []
    for _ in range(300):
        offset = torch.randn(40, 8, 1, 1, dtype=torch.float64, generator=generator)
        stream = offset + 0.5 * torch.randn(40, 8, 1, 16, dtype=torch.float64, generator=generator)
        whole = Moments.of(stream.reshape(-1, 1, 16))
        a, b = _spread(stream).standard_errors()
        means.append(whole.mean)
        variances.append(whole.variance())
        mean_errors.append(a.square())
        variance_errors.append(b.square())
    # 300 repetitions know a standard deviation to 4 % (1/√600); four times that
    for values, errors in ((means, mean_errors), (variances, variance_errors)):
        ratio = torch.stack(errors).mean().sqrt() / torch.stack(values).std()
        assert 0.84 < float(ratio) < 1.16


def test_a_long_stream_keeps_a_bounded_number_of_groups_and_all_values():
    batches = torch.randn(1000, 4, 2, dtype=torch.float64)
    spread = _spread(batches)
    assert MOST_GROUPS // 2 <= len(spread.groups) <= MOST_GROUPS
    assert int(sum(g.count[0] for g in spread.groups)) == 4000
    short = batches.mean(1).std(0) / math.sqrt(1000)
    ratio = spread.standard_errors()[0] / short
    assert bool(((ratio > 0.6) & (ratio < 1.4)).all())  # of 62 groups: known to 9 %


def test_a_large_mean_costs_no_digits():
    batches = torch.randn(20, 16, 2, dtype=torch.float64)
    shifted = _spread(batches + 1e6).standard_errors()
    torch.testing.assert_close(shifted, _spread(batches).standard_errors(), rtol=1e-6, atol=1e-9)


def test_channels_that_a_batch_misses_do_not_count_it():
    a, b = Moments.of(torch.tensor([[1.0], [3.0]])), Moments.of(torch.tensor([[3.0], [5.0]]))
    spread = Spread()
    for index, batch in enumerate((a, Moments.zero(1), b)):
        spread.add(batch, index)
    assert spread.standard_errors()[0].tolist() == [1.0]


def test_values_that_come_later_belong_to_their_batch():
    whole, parts = Spread(), Spread()
    batches = torch.randn(100, 6, 2, dtype=torch.float64)
    for index, batch in enumerate(batches):
        whole.add(Moments.of(batch), index)
    for half in (batches[:, :2], batches[:, 2:]):
        for index, batch in enumerate(half):
            parts.add(Moments.of(batch), index)
    torch.testing.assert_close(parts.standard_errors(), whole.standard_errors(), rtol=1e-12, atol=0)
