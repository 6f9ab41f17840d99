"""Every figure of the tour, as data."""

from __future__ import annotations

import json
from pathlib import Path

from batchnorm.demo.result import DemoResult


def test_the_figures_are_json_and_what_is_not_finite_is_none(stations: DemoResult) -> None:
    data = json.loads(json.dumps(stations.to_dict(), allow_nan=False))
    assert data["pictures"] == {"train": 1347, "test": 450}
    assert (data["favourite_learning_rate"], data["training_loss_by_learning_rate"]) == (
        0.5,
        {"0.5": 0.25, "2.5": None},
    )
    assert [(run["norm"], run["learning_rate"], run["training_loss"]) for run in data["runs"]] == [
        (False, 0.5, 0.25),
        (True, 0.5, 0.125),
        (False, 2.5, None),
        (True, 2.5, 0.1),
    ]
    assert data["runs"][0]["probes"][1] == {
        "step": 30,
        "accuracy": 0.8,
        "percentiles": [-1.0, 0.0, 1.0],
        "saturated": 0.25,
    }
    assert data["statistics"][1] == {"name": "population", "accuracy": 0.925, "loss": 0.3}
    assert data["freeze"]["statistics_kept_after_train"] is True
    assert data["fold"]["accuracy"] == 0.925
    assert data["inference"] == {"before": 50.0, "after": 40.0, "speedup": 1.25}
    assert [(row["pictures"], row["drifted"]) for row in data["watch"]] == [
        ("as in training", False),
        ("inverted", True),
    ]
    assert data["report"] == str(Path("tour") / "report.html")


def test_it_is_a_result_like_any_other(stations: DemoResult) -> None:
    assert repr(stations).startswith(
        "<DemoResult: digits: 1,347 training and 450 test pictures, 90 steps of 60, seed 3"
    )
    assert "The life of a batch-normalized network" in str(stations)
