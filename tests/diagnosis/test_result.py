"""A diagnosis as text, as data and as a page."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.diagnosis.metrics import spread_out

import batchnorm
from batchnorm.diagnosis.result import DiagnoseResult, Finding, Metrics
from batchnorm.diagnosis.trial import Gain
from batchnorm.statistics.sites import Left


def test_the_result_prints_and_turns_into_data_and_a_page(net, batches, tmp_path) -> None:
    net.bn2.running_mean[0] = torch.nan
    result = batchnorm.diagnose(net, batches, spread_out)
    text = str(result)
    assert "bn2" in text
    assert "poisoned" in text
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["findings"][0]["cause"] == "poisoned"
    assert data["layers"][1]["mean_shift"][0] is None
    page = result.to_html(tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 * len(result.layers)
    assert "bn2: poisoned" in repr(result)


def finding(
    cause: str = "stale", severity: Any = "wrong", layers: tuple[str, ...] = ("bn1",), gain: Gain | None = None
) -> Finding:
    return Finding(layers[0], cause, severity, "evidence", "cure()", gain, layers)


def layer(name: str = "bn1", *, off: bool = False, shift: float = 0.0) -> Any:
    """The gap of a norm of two channels."""
    return SimpleNamespace(
        name=name,
        off=off,
        distance=abs(shift),
        deployed_distance=math.inf,
        recalibrated_distance=math.nan,
        mean_shift=torch.tensor([shift, 0.0]),
        variance_ratio=torch.tensor([2.0, 0.5]),
        kl=torch.tensor([1e-6, 0.0]),
        relative_error=0.01,
        to_dict=lambda: {"name": name},
    )


@pytest.mark.parametrize(
    ("findings", "summary", "tone"),
    [
        ([], "Nothing found: 2 norms on 1 sample; each norm meets what it has stored.", "good"),
        ([finding("untrained", "note")], "Nothing wrong found: 2 norms on 1 sample; untrained.", "good"),
        ([finding()], "bn1: stale (wrong). 2 norms on 1 sample.", "bad"),
        (
            [finding("poisoned", "fatal", ("", "bn1")), finding(), finding("untrained", "note")],
            "(the model): poisoned (fatal). First of 2 findings. 2 norms on 1 sample.",
            "bad",
        ),
    ],
)
def test_the_summary(findings: list[Finding], summary: str, tone: str) -> None:
    result = DiagnoseResult(findings, [layer(), layer("bn2")], None, 1, 1)
    assert (result.summary, result.document().tone, result.healthy) == (summary, tone, tone == "good")


def test_the_sections_are_those_that_have_something_to_say() -> None:
    def titles(result: DiagnoseResult) -> list[str]:
        return [section.title for section in result.document().sections]

    assert titles(DiagnoseResult([], [], None, 1, 1)) == []
    whole = DiagnoseResult(
        [finding(), finding("untrained", "note")],
        [layer()],
        Metrics(0.5, math.nan, None, False),
        2,
        9,
        [Left("x", "why")],
    )
    assert titles(whole) == [
        *("Findings", "Worth knowing, and no fault", "The metric"),
        *("Layers, in order of execution", "Layer by channel", "Not measured"),
    ]
    (facts,) = whole.document().sections[2].blocks
    assert next(value for _, value in facts.items) == 0.5
    assert dict(facts.items)["more is better"] == "no"
    data = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert data["metrics"] == {"training": 0.5, "eval": None, "recalibrated": None, "higher_is_better": False}
    assert data["left"] == [{"name": "x", "reason": "why"}]
    assert (data["findings"][0]["layers"], data["findings"][0]["gain"]) == (["bn1"], None)


def test_a_doubtful_finding_has_no_colour_and_a_gain_is_told() -> None:
    gain = Gain(1.0, 0.5, None, None, 0.5)
    result = DiagnoseResult([finding(), finding("small_batches", "doubtful", gain=gain)], [], None, 1, 1)
    found, cures = result.document().sections[0].blocks
    assert found.tones == {0: "bad"}
    assert [row[-1] for row in cures.rows] == [None, "mean gap 1 → 0.5"]
    assert list(found.shown) == [0, 1]


def test_numbers_of_layers_are_short_and_gaps_that_are_not_finite_are_drawn_as_three() -> None:
    result = DiagnoseResult([], [layer("a", off=True, shift=-0.12345), layer("b")], None, 1, 1)
    plot, table = result.document().sections[0].blocks
    assert list(table.rows[0]) == [1, "a", 0.123, math.inf, 0.123, "0.5\u00a0–\u00a02", "<0.001", 0.01]
    assert (table.tones, table.rows[1][2]) == ({0: "bad"}, "<0.001")
    assert {series.name: list(series.y) for series in plot.series} == {
        "in eval mode": [3.0, 3.0],
        "its own": [0.12345, 0.0],
        "after a trial recalibration": [3.0, 3.0],
    }
    shifts, ratios = result.document().sections[1].blocks
    assert shifts.rows[0] == ("a", pytest.approx([-0.12345, 0.0]))
    assert ratios.rows[0] == ("a", [1.0, -1.0])


@pytest.mark.parametrize(("count", "style", "last"), [(20, "bar", "n19"), (21, "line", 21)])
def test_many_norms_are_drawn_as_lines_by_their_number(count: int, style: str, last: object) -> None:
    result = DiagnoseResult([], [layer(f"n{i}") for i in range(count)], None, 1, 1)
    plot = result.document().sections[0].blocks[0]
    assert {series.style for series in plot.series} == {style}
    assert plot.series[0].x[-1] == last
