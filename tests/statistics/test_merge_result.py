"""What the result of a merge says: by how much the models disagree, in one sentence and norm by norm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.statistics import MergeResult, merge


def norm(mean: list[float], variance: list[float]) -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(len(mean), eps=0.25)
    made.running_mean, made.running_var = torch.tensor(mean), torch.tensor(variance)
    return made


@pytest.fixture
def result() -> MergeResult:
    near = [nn.Sequential(norm([shift, 0.0], [1.0, 0.0]), norm([shift / 4], [0.75])) for shift in (0.0, 4.0)]
    return merge(near)


def test_the_report(result: MergeResult) -> None:
    text = " ".join(str(result).split())
    assert "2 models merged: 4 tensors averaged, the statistics of 2 norms mixed." in text
    assert "not what this model computes with its averaged weights: up to 80% of a variance (0) lies between" in text
    assert "whose means are up to 3.58 standard deviations apart (0)" in text  # 4 / √(1 + 0.25)
    assert "batchnorm.recalibrate(result.model, batches)" in text
    assert repr(result).startswith("<MergeResult: 2 models merged")


def test_the_data_is_json(result: MergeResult) -> None:
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["verb"] == "merge"
    assert data["weights"] == [0.5, 0.5]
    assert data["averaged"] == 4
    assert data["advice"] == result.advice
    assert data["layers"] == [
        {
            "name": "0",
            "largest_between_share": pytest.approx(0.8),
            "mean_between_share": pytest.approx(0.4),
            "largest_distance": pytest.approx(4 / 1.25**0.5),
        },
        {
            "name": "1",
            "largest_between_share": pytest.approx(0.25),
            "mean_between_share": pytest.approx(0.25),
            "largest_distance": pytest.approx(1.0),
        },
    ]


def test_a_distance_without_any_variance_is_no_number() -> None:
    one, other = nn.Module(), nn.Module()
    for module, mean in ((one, 0.0), (other, 1.0)):
        module.register_buffer("running_mean", torch.tensor([mean]))
        module.register_buffer("running_var", torch.tensor([0.0]))
    result = merge([one, other])  # no norm that would tell its ε
    assert result.layers[0].distance.item() == torch.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["layers"][0]["largest_distance"] is None
    assert "inf standard deviations" in result.advice


def test_the_page(result: MergeResult, tmp_path: Path) -> None:
    page = result.to_html(tmp_path / "merge.html").read_text()
    assert "largest share between" in page


@pytest.mark.parametrize(
    ("means", "said"),
    [
        ((0.0, 0.0), "No mean differs between the models"),
        ((0.0, 0.142), "up to 0.5% "),
        ((0.0, 0.002), "up to 0.0001% "),
        ((0, 200), "to 100% "),
    ],
)
def test_the_advice_has_as_many_digits_as_the_share(means: tuple[float, float], said: str) -> None:
    models = [nn.BatchNorm1d(1), nn.BatchNorm1d(1)]
    for model, mean in zip(models, means, strict=True):
        assert model.running_mean is not None
        model.running_mean.fill_(mean)
    assert said in merge(models).advice
