"""What a norm meets in a pass, call by call, and what it normalizes by meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.diagnosis.conftest import passes_of
from torch import nn

import batchnorm.functional
from batchnorm.diagnosis.norm_record import Basis, NormRecord
from batchnorm.errors import NonFiniteError
from batchnorm.moments import Moments
from batchnorm.statistics.estimators import Pooled


class Twice(nn.Module):
    """One norm, called on x and on 3 x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.norm(x), self.norm(3 * x + 1)])


@pytest.fixture
def data() -> list[torch.Tensor]:
    return list(torch.randn(4, 32, 4, generator=torch.Generator().manual_seed(0)))


def test_calls_within_a_forward_pass_are_told_apart(data) -> None:
    done = passes_of(Twice().eval(), data).run(Basis("stored"))
    (record,) = done.records.values()
    whole = torch.cat(data)
    assert (record.calls, record.batches, record.samples, record.fewest) == (8, 4, 256, 32)
    for met, x in zip(record.per_call, (whole, 3 * whole + 1), strict=True):
        torch.testing.assert_close(met.mean, Moments.of(x).mean, rtol=1e-5, atol=1e-6)
    assert len(record.per_batch) == 4


def test_each_call_may_be_given_statistics_of_its_own(data) -> None:
    model = Twice().eval()
    outputs: list[torch.Tensor] = []
    passes = passes_of(model, data, lambda output, batch: outputs.append(output) or 0.0)
    (site,) = passes.sites.known
    whole = torch.cat(data)
    own = [(met.mean, met.variance(correction=1)) for met in (Moments.of(whole), Moments.of(3 * whole + 1))]
    passes.run(Basis("stored", {site: own}))
    both = torch.cat(outputs, 1)
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-4)  # the same up to scale and shift before the norm


def call_on(x: torch.Tensor) -> Any:
    return SimpleNamespace(input=x)


def test_a_norm_that_is_called_very_often_keeps_eight_calls_apart_and_loses_no_value() -> None:
    record = NormRecord(Pooled(1), 0.0)
    values = torch.arange(20.0).view(10, 2, 1)
    for number, x in enumerate(values):
        record.take([Moments.of(x)], 0, call_on(x))
        assert record.call_in_batch == number
    assert len(record.per_call) == 8
    assert [met.count.item() for met in record.per_call] == [2] * 7 + [6]
    assert record.estimator.pooled == Moments.of(values.view(-1, 1))
    assert (record.batches, record.calls, record.samples, record.fewest) == (1, 10, 20, 2)


def test_groups_of_samples_are_what_errors_come_from() -> None:
    record, x = NormRecord(Pooled(1), 0.0), torch.arange(8.0).view(8, 1)
    met = record.take([Moments.of(part) for part in x.split(2)], 3, call_on(x))
    assert met == Moments.of(x)
    assert len(record.spread.groups) == 4
    assert len(record.per_batch) == 1
    mean, variance = record.statistics
    assert (mean.item(), variance.item()) == (3.5, 6.0)


def test_a_norm_is_told_by_whom_it_is_fed_and_that_it_asked_for_the_batch(data) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4, track_running_stats=True)).eval()
    passes = passes_of(model, data)
    (record,) = passes.run(Basis("stored")).records.values()
    assert torch.equal(record.feeder, model[0].weight)
    assert torch.equal(record.weight, model[2].weight)
    assert not record.on_batch
    model[2].train()
    (record,) = passes.run(Basis("stored")).records.values()
    assert record.on_batch


def test_values_that_are_not_finite_are_an_error_unless_they_are_let_pass(data) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    poisoned = [data[0], data[1] * torch.nan]
    with pytest.raises(NonFiniteError, match=r"batch 1 .*0 met NaN or infinity in 4 of its 4 channels"):
        passes_of(model, poisoned).run(Basis("stored"))
    (record,) = passes_of(model, poisoned).run(Basis("stored"), tolerant=True).records.values()
    assert record.batches == 2
    assert not record.estimator.pooled.isfinite().any()


def test_masked_positions_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(2))
            self.register_buffer("running_var", torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.tensor([True, True, False]).expand(len(x), 3)
            return batchnorm.functional.batch_norm(x, self.running_mean, self.running_var, mask=mask)

    x = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    (record,) = passes_of(Masked().eval(), [x[:3], x[3:]]).run(Basis("stored")).records.values()
    torch.testing.assert_close(record.estimator.pooled.mean, x[..., :2].double().mean((0, 2)))
    assert record.fewest == 6
