"""What was measured is written in all processes or in none, and everything else is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.errors import BatchError
from batchnorm.moments import Moments
from batchnorm.statistics.agreement import Borrowed
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.finish import finish
from batchnorm.statistics.outcome import Outcome
from batchnorm.statistics.ranks import Alone
from batchnorm.statistics.result import MeasurementPlan, RecalibrateResult
from batchnorm.statistics.sites import NothingToMeasure, Sites
from batchnorm.statistics.tally import Tally

PLAN = MeasurementPlan("parallel", "pooled", None, 1)
X = torch.tensor([[1.0, 4.0], [3.0, 8.0]])


def tally() -> Tally:
    found = Tally(Pooled(2), 1e-5)
    found.add(Moments.of(X), 0, first=True, fewest=2, most=2)
    return found


def model() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))


def finished(net: nn.Module, ranks: Any = None, measured: int = 1, sites: Sites | None = None) -> RecalibrateResult:
    sites = sites or Sites(net, None)
    outcome = Outcome({site: tally() for site in sites.known[:measured]}, 1)
    return finish(PLAN, sites, outcome, ranks or Alone(), Borrowed())


def test_buffers_hold_what_was_met_and_the_result_knows_both() -> None:
    net = model()
    mean = net[0].running_mean
    result = finished(net)
    assert net[0].running_mean is mean  # written in place
    assert [net[0].running_mean.tolist(), net[0].running_var.tolist()] == [[2, 6], [2, 8]]
    assert int(net[0].num_batches_tracked) == 1
    (layer,) = result.layers
    assert (layer.name, layer.batches, layer.calls, layer.values) == ("0", 1, 1, 2)
    assert [layer.mean_before.tolist(), layer.mean_after.tolist()] == [[0, 0], [2, 6]]
    assert result.population.layers["0"].moments == Moments.of(X)
    assert result.population.layers["0"].of_norm is True
    assert net[1].running_mean.tolist() == [0, 0]
    assert [left.name for left in result.left] == ["1"]
    assert result.left[0].reason.startswith("never called during the pass;")
    result.undo()
    assert net[0].running_mean.tolist() == [0, 0]


def test_functional_norms_whose_statistics_are_no_buffers_are_told() -> None:
    net = model()
    sites = Sites(net, None)
    sites.unknown_calls = 3
    reasons = [(left.name, left.reason) for left in finished(net, measured=2, sites=sites).left]
    assert reasons == [("(functional)", "its running statistics are not buffers of the model")]


def test_a_model_that_called_no_norm_is_refused() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.zeros(2))
            self.register_buffer("b", torch.ones(2))

    with pytest.raises(NothingToMeasure, match="the model called no batch norm with running statistics"):
        finished(Opaque(), measured=0)


class Ranks:
    """Two processes, of which the other one fails at the exchange of that name."""

    rank, size = 0, 2

    def __init__(self, failing: str | None) -> None:
        self.failing = failing
        self.told: list[Any] = []

    def agree(self, value: Any) -> list[Any]:
        self.told.append(value)
        if value == self.failing:
            raise BatchError("recalibrate: another process failed")
        return [value, value]


@pytest.mark.parametrize("failing", ["ready to write", "written"])
def test_where_another_process_cannot_write_this_one_does_not_either(failing: str) -> None:
    net = model()
    net[0].running_var.fill_(3.0)
    before: dict[str, Tensor] = copy.deepcopy(net.state_dict())
    with pytest.raises(BatchError, match="another process failed"):
        finished(net, Ranks(failing))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_processes_agree_before_and_after_they_write() -> None:
    ranks = Ranks(None)
    result = finished(model(), ranks)
    assert ranks.told[1:] == ["ready to write", "written"]
    assert len(result.left) == 1  # what both left is named once
