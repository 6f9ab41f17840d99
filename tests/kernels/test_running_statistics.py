"""Steps of running statistics: only finite ones are taken, and every path agrees which those are."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels import running_statistics
from batchnorm.kernels.contract import Counters
from batchnorm.kernels.plain import is_counter
from batchnorm.kernels.running_statistics import commit_if_finite, keep_finite, update_running
from batchnorm.moments import Moments

INF, NAN = float("inf"), float("nan")


def counters():
    return Counters(torch.tensor(0), torch.tensor(0))


def counts(c):
    return c.batches.item(), c.refused.item()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, 1.0), (0.0, NAN), (0.0, INF), (-INF, INF)])
def test_a_channel_takes_both_values_or_none(monkeypatch, native, dtype, bad):
    if not native:
        monkeypatch.setattr(running_statistics, "library", None)
    c = counters()
    mean, var = torch.tensor([1.0, 2.0, 3.0], dtype=dtype), torch.tensor([4.0, 5.0, 6.0], dtype=dtype)
    new_mean, new_var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    new_mean[1], new_var[1] = bad
    commit_if_finite(new_mean, new_var, mean, var, c, followed=False)
    assert mean.tolist() == [0, 2, 0]
    assert var.tolist() == [1, 5, 1]
    assert counts(c) == (0, 1)
    commit_if_finite(torch.zeros_like(mean), torch.ones_like(var), mean, var, c, followed=False)
    assert (mean.tolist(), var.tolist(), counts(c)) == ([0] * 3, [1] * 3, (1, 1))


@pytest.mark.parametrize("native", [True, False])
def test_every_write_shows_in_the_versions(monkeypatch, native):
    if not native:
        monkeypatch.setattr(running_statistics, "library", None)
    c = counters()
    mean, var = torch.zeros(2), torch.ones(2)
    before = [t._version for t in (mean, var, c.batches)]
    commit_if_finite(torch.ones(2), torch.ones(2), mean, var, c, followed=False)
    assert all(now > old for now, old in zip([t._version for t in (mean, var, c.batches)], before, strict=True))


def test_without_counters_nothing_is_counted():
    mean, var = torch.zeros(1), torch.ones(1)
    commit_if_finite(torch.tensor([5.0]), torch.tensor([7.0]), mean, var, Counters(), followed=False)
    assert (mean.item(), var.item()) == (5, 7)


def test_half_buffers_and_strided_ones_are_served_too():
    for mean in (torch.zeros(3).half(), torch.zeros(6)[::2]):
        c, var = counters(), torch.ones_like(mean)
        commit_if_finite(torch.tensor([1.0, NAN, 3.0]).to(mean), torch.ones(3).to(mean), mean, var, c, followed=False)
        assert mean.tolist() == [1, 0, 3]
        assert counts(c) == (0, 1)


def test_keep_finite_puts_old_values_back_unseen_by_autograd():
    mean, var = torch.tensor([1.0, NAN]), torch.tensor([2.0, 3.0])
    c, versions = counters(), (mean._version, var._version)
    keep_finite(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1.5]), mean, var, c)
    assert (mean.tolist(), var.tolist()) == ([1, 0.5], [2, 1.5])
    assert counts(c) == (0, 1)
    assert (mean._version, var._version) == versions


def test_a_step_is_the_formula_with_the_unbiased_variance_rounded_once():
    x = torch.randn(50, 3, dtype=torch.float64)
    mean, var = torch.full((3,), 0.3), torch.full((3,), 0.7)
    old_mean, old_var = mean.double(), var.double()
    update_running(mean, var, Moments.of(x), 0.1)
    assert torch.equal(mean, ((1 - 0.1) * old_mean + 0.1 * Moments.of(x).mean).float())
    assert torch.equal(var, ((1 - 0.1) * old_var + 0.1 * Moments.of(x).variance(correction=1)).float())


def test_a_step_leaves_channels_without_a_variance_and_does_not_call_them_refused():
    m = Moments(*(torch.tensor(v, dtype=torch.float64) for v in ([4, 1, 4], [1, 9, NAN], [3, 0, NAN])))
    c, mean, var = counters(), torch.zeros(3), torch.ones(3)
    update_running(mean, var, m, 1.0, c)
    assert (mean.tolist(), var.tolist(), counts(c)) == ([1, 0, 0], [1, 1, 1], (0, 1))
    two = Moments(m.count[:2], m.mean[:2], m.m2[:2])
    update_running(mean[:2], var[:2], two, 1.0, c)
    assert counts(c) == (1, 1)


def test_a_variance_beyond_the_dtype_does_not_enter():
    m = Moments(*(torch.tensor([v], dtype=torch.float64) for v in (2, 0, 1e60)))
    mean, var = torch.zeros(1), torch.ones(1)
    update_running(mean, var, m, 0.5)
    assert (mean.item(), var.item()) == (0, 1)


def test_what_kernels_can_count_in():
    assert is_counter(None)
    assert is_counter(torch.tensor(0))
    assert not is_counter(torch.tensor(0.0))
    assert not is_counter(torch.zeros(2, dtype=torch.int64))
    assert not is_counter(torch.tensor(0, device="meta"))
