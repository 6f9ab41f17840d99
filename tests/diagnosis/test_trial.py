"""What a cure would bring, tried on another basis."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.diagnosis.case_of import case_of
from tests.diagnosis.conftest import passes_of
from torch import Tensor, nn

import batchnorm
from batchnorm.diagnosis.case import Remedy
from batchnorm.diagnosis.norm_record import Basis, NormRecord
from batchnorm.diagnosis.passes import Pass
from batchnorm.diagnosis.trial import Gain, outstanding, try_remedy
from batchnorm.errors import NonFiniteError
from batchnorm.moments import Moments
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.sites import Site


def test_what_is_outstanding_falls_to_nothing_on_population_statistics(net, batches) -> None:
    net.bn2.reset_running_stats()
    passes = passes_of(net, batches)
    assert outstanding(passes.run(Basis("stored")), Basis("stored")) > 0.1
    batchnorm.recalibrate(net, batches)
    assert outstanding(passes.run(Basis("stored")), Basis("stored")) < 1e-6


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (Gain(1.234, 0.5678, None, None, 0.5), "mean gap 1.2 → 0.57"),
        (Gain(1.0, 0.5, 0.71234, 0.9, None), "metric 0.7123 → 0.9"),
        (Gain(1.0, 0.5, 0.7, None, None), "mean gap 1 → 0.5"),
    ],
)
def test_a_gain_is_a_few_words(gain: Gain, text: str) -> None:
    assert str(gain) == text


def test_a_gain_as_data_has_no_number_that_json_lacks() -> None:
    assert Gain(math.inf, 0.5, math.nan, None, 1.5).to_dict() == {
        "gap_before": None,
        "gap_after": 0.5,
        "metric_before": None,
        "metric_after": None,
        "closed": 1.5,
    }


def met(*batches: Tensor, eps: float = 0.0, on_batch: bool = False) -> NormRecord:
    """What a norm met, one batch a call within one forward pass."""
    record = NormRecord(Pooled(batches[0].shape[1]), eps, on_batch=on_batch)
    for batch in batches:
        call: Any = SimpleNamespace(input=batch)
        record.take([Moments.of(batch)], 0, call)
    return record


def site_of(mean: float, variance: float) -> Site:
    """A norm of one channel that stores this."""
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(mean)
    norm.running_var.fill_(variance)
    return Site("", norm, ("running_mean", "running_var", None), "")


X = torch.tensor([[1.0], [3.0]])  # mean 2, variance 2
STATISTICS = (torch.tensor([2.0]).double(), torch.tensor([2.0]).double())


def test_what_is_outstanding_is_the_mean_distance_over_the_norms() -> None:
    right, wrong, broken = site_of(2.0, 2.0), site_of(2.0 + 2**0.5, 2.0), site_of(math.nan, 1.0)
    for sites, gap in (([right], 0.0), ([wrong], 1.0), ([right, wrong], 0.5), ([broken], 3.0), ([], 0.0)):
        done = Pass({site: met(X) for site in sites}, None)
        assert outstanding(done, Basis("stored")) == pytest.approx(gap)


def test_norms_on_the_batch_owe_nothing_and_those_that_are_given_statistics_owe_what_these_are_off() -> None:
    wrong = site_of(100.0, 2.0)
    done = Pass({wrong: met(X, on_batch=True)}, None)
    assert outstanding(done, Basis("stored")) == 0.0
    assert outstanding(done, Basis("stored", {wrong: [STATISTICS]})) == pytest.approx(0.0)


def test_of_several_calls_the_worst_counts() -> None:
    site = site_of(0.0, 1.0)
    done = Pass({site: met(X, X + 2**0.5)}, None)
    assert outstanding(done, Basis("stored", {site: [STATISTICS, STATISTICS]})) == pytest.approx(1.0)


class Passing:
    """Passes whose runs are given."""

    def __init__(self, done: Pass | Exception) -> None:
        self.done, self.batches, self.walked = done, [1, 2], []

    def over(self, batches: list[int], *, measured: bool) -> Passing:
        assert measured
        self.walked = batches
        return self

    def run(self, basis: Basis) -> Pass:
        if isinstance(self.done, Exception):
            raise self.done
        return self.done


def test_a_cure_is_tried_on_its_basis_and_its_change_of_the_batches() -> None:
    wrong = site_of(2.0 + 2**0.5, 2.0)
    deployed, cured = Pass({wrong: met(X)}, None), Pass({wrong: met(X)}, None)
    passing = Passing(cured)
    case = case_of(deployed=deployed, passes=passing)
    basis = Basis("stored", {wrong: [STATISTICS]})
    trial = try_remedy(case, Remedy("cure()", basis, change=lambda batch: 10 * batch))
    assert trial is not None
    assert passing.walked == [10, 20]
    assert (trial.done, trial.gain.metric_before) == (cured, None)
    assert (trial.gain.gap_before, trial.gain.gap_after, trial.gain.closed) == pytest.approx((1.0, 0.0, 1.0))
    still = try_remedy(case_of(deployed=Pass({}, None), passes=passing), Remedy("cure()", basis))
    assert still is not None
    assert still.gain.closed is None  # there was no gap


def test_what_cannot_be_tried_is_not() -> None:
    assert try_remedy(case_of(), Remedy("train_again()")) is None
    poisoned = case_of(passes=Passing(NonFiniteError("another layer")))
    assert try_remedy(poisoned, Remedy("cure()", Basis("stored"))) is None
