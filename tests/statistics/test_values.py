"""What buffers are to hold: the estimate in their own dtype and shape, or a sentence why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import NonFiniteError, ShapeError
from batchnorm.moments import Moments
from batchnorm.statistics.estimators import Pooled, Within
from batchnorm.statistics.sites import Site, Sites
from batchnorm.statistics.tally import Tally
from batchnorm.statistics.values import new_values, rounded, statistics_of


def met(norm: nn.Module, *batches: torch.Tensor, estimator: type[Pooled] | type[Within] = Pooled) -> tuple[Site, Tally]:
    (site,) = Sites(norm, None).known
    tally = Tally(estimator(batches[0].shape[1]), 1e-5)
    for index, batch in enumerate(batches):
        tally.add(Moments.of(batch), index, first=True, fewest=len(batch), most=len(batch))
    return site, tally


X = torch.tensor([[1.0, -1.0], [3.0, 1.0], [5.0, 3.0]])


def test_buffers_keep_their_dtype_and_count_batches() -> None:
    site, tally = met(nn.BatchNorm1d(2).half(), X[:2], X[2:])
    new = new_values(site, tally)
    assert {key: value.tolist() for key, value in new.items()} == {
        "running_mean": [3, 1],
        "running_var": [4, 4],
        "num_batches_tracked": 2,
    }
    assert [value.dtype for value in new.values()] == [torch.float16, torch.float16, torch.int64]
    assert site.running_mean.tolist() == [0, 0]  # nothing is written yet


def test_a_norm_that_counts_nothing_is_given_no_count() -> None:
    norm = nn.BatchNorm1d(2)
    norm.num_batches_tracked = None
    assert list(new_values(*met(norm, X))) == ["running_mean", "running_var"]


def test_statistics_that_were_normalized_by_take_the_place_of_those_that_were_met() -> None:
    site, tally = met(nn.BatchNorm1d(2), X)
    tally.stored = (torch.tensor([7.0, 8.0]), torch.tensor([9.0, 10.0]))
    new = new_values(site, tally)
    assert (new["running_mean"].tolist(), new["running_var"].tolist()) == ([7, 8], [9, 10])


@pytest.mark.parametrize(
    ("estimator", "batches", "scope"),
    [
        (Pooled, [X[:1]], "in all; channel 0 met 1 in 1 calls"),
        (Within, [X[:1], X[1:2]], "in some batch; channel 0 met 2 in 2 calls"),
    ],
)
def test_too_few_values_are_told_with_norm_channel_and_counts(estimator, batches, scope: str) -> None:
    with pytest.raises(ShapeError) as caught:
        new_values(*met(nn.BatchNorm1d(2), *batches, estimator=estimator))
    assert str(caught.value) == (
        f"recalibrate: the norm: a variance needs at least 2 values per channel {scope}. Pass larger or more batches. "
        "The model is as it was."
    )


def test_a_value_that_does_not_fit_the_buffer_is_told() -> None:
    with pytest.raises(NonFiniteError, match=r"the norm: running_var reaches 4e\+06, more than torch.float16 can hold"):
        new_values(*met(nn.BatchNorm1d(2).half(), 1000 * X))


@pytest.mark.parametrize(("dtype", "used"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_a_norm_normalizes_by_what_its_buffers_will_hold(dtype: torch.dtype, used: torch.dtype) -> None:
    site, tally = met(nn.BatchNorm1d(2).to(dtype), X / 3)
    mean, variance = statistics_of(site, tally)
    assert mean.dtype == variance.dtype == used
    exact_mean, exact_variance = tally.estimator.statistics()
    assert torch.equal(mean, exact_mean.to(dtype).to(used))
    assert torch.equal(variance, exact_variance.to(dtype).to(used))
    again = rounded(site, mean, variance)
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], variance)
