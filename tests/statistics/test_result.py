"""What the result of a recalibration says, and how it takes the recalibration back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from batchnorm.errors import StateError
from batchnorm.nn import freeze
from batchnorm.statistics import RecalibrateResult, recalibrate


def norm_with(mean: list[float], variance: list[float]) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(len(mean), eps=0.25)
    norm.running_mean = torch.tensor(mean)
    norm.running_var = torch.tensor(variance)
    norm.num_batches_tracked.fill_(77)
    return norm


def recalibrated(model: nn.Module) -> RecalibrateResult:
    return recalibrate(model, [torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[6.0, 0.0]])])


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


def test_before_and_after_shift_and_ratio() -> None:
    result = recalibrated(nn.Sequential(norm_with([0.0, 1.0], [1.0, 0.0])))
    (layer,) = result.layers
    assert layer.mean_before.tolist() == [0, 1]
    assert layer.variance_before.tolist() == [1, 0]
    assert layer.mean_after.tolist() == [3, 0]
    assert layer.variance_after.tolist() == [7, 0]
    # eps is part of what inference divides by, so a dead channel has numbers too
    torch.testing.assert_close(layer.mean_shift, torch.tensor([3 / 7.25**0.5, -1 / 0.25**0.5], dtype=torch.float64))
    torch.testing.assert_close(layer.variance_ratio, torch.tensor([7.25 / 1.25, 1.0], dtype=torch.float64))


def test_the_report_and_the_data() -> None:
    model = nn.Sequential(norm_with([0.0, 1.0], [1.0, 0.0]), nn.BatchNorm1d(2))
    freeze(model, "1")
    result = recalibrated(model)
    text = " ".join(str(result).split())
    assert "1 norm measured on 2 batches, sequential order, pooled estimate; 1 left as they were." in text
    assert "1 call brought a single value per channel" in text
    assert "frozen" in text
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["layers"][0] == {
        "name": "0",
        "batches": 2,
        "calls": 2,
        "values": 3,
        "single_calls": 1,
        "largest_mean_shift": pytest.approx(2.0),
        "smallest_variance_ratio": pytest.approx(1.0),
        "largest_variance_ratio": pytest.approx(5.8),
        "uncertainty": pytest.approx(result.layers[0].overall_uncertainty),
    }
    assert data["left"] == [{"name": "1", "reason": "frozen"}]


def test_poisoned_statistics_are_cured_and_reported_as_unknown() -> None:
    model = nn.Sequential(norm_with([float("nan"), 0.0], [float("inf"), 1.0]))
    before = bits(model)
    result = recalibrate(model, [torch.randn(8, 2)])
    assert model[0].running_var.isfinite().all()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["layers"][0]["largest_mean_shift"] is None
    result.undo()
    assert bits(model) == before


def test_undo_is_bit_exact_and_happens_once() -> None:
    model = nn.Sequential(norm_with([-0.0, 1.0], [1.0, 3e-39]))  # a negative zero and a denormal
    before = bits(model)
    result = recalibrated(model)
    assert bits(model) != before
    result.undo()
    assert bits(model) == before
    with pytest.raises(StateError, match="already undone"):
        result.undo()


def test_undo_returns_past_later_training() -> None:
    model = nn.Sequential(norm_with([0.0, 1.0], [1.0, 1.0]))
    before = bits(model)
    result = recalibrated(model)
    model.train()(torch.randn(8, 2))
    result.undo()
    assert bits(model) == before


def test_undo_follows_a_model_that_was_cast() -> None:
    model = nn.Sequential(norm_with([0.5, 1.0], [1.0, 2.0]))
    result = recalibrated(model)
    model.double()
    result.undo()
    assert model[0].running_mean.tolist() == [0.5, 1.0]
    assert model[0].running_var.dtype == torch.float64


@pytest.mark.parametrize("now", [torch.zeros(3), None])
def test_undo_refuses_a_layer_that_was_rebuilt_and_changes_nothing(now: Tensor | None) -> None:
    model = nn.Sequential(norm_with([0.0, 1.0], [1.0, 1.0]), norm_with([0.0, 1.0], [1.0, 1.0]))
    result = recalibrated(model)
    model[1].running_var = now
    after = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"1\.running_var held \(2,\) values"):
        result.undo()
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())
    model[1].running_var = torch.ones(2)
    result.undo()
    assert model[0].running_mean.tolist() == [0, 1]


def test_a_model_that_is_a_norm_itself() -> None:
    norm = norm_with([0.0, 1.0], [1.0, 1.0])
    result = recalibrated(norm)
    assert [layer.name for layer in result.layers] == [""]
    result.undo()
    assert norm.num_batches_tracked == 77
