"""The report of a fold: as text, as data, as a page; measured when it is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import InputError, StateError
from batchnorm.folding.report.sections import in_bytes, large
from batchnorm.folding.result import FoldResult

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def result() -> FoldResult:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4), nn.Sigmoid()
    ).eval()
    net[1].running_mean.normal_()
    return batchnorm.fold(net, X)


def test_the_text_says_what_became_of_each_norm_and_what_it_saves(result: FoldResult) -> None:
    text = " ".join(str(result).split())
    assert "Its scale and shift go back into the convolution 0." in text
    assert (
        "multiply-adds saved 288 of 8.35 k (3.45%)" in text
    )  # 2 × 4 × 6 × 6 of those, two norms, and 27 times as many
    assert "operators in a pass 5 → 4" in text
    assert "memory traffic of activations saved 2.25 KiB" in text
    assert "It reads the output of tanh in 2, which is no linear operator." in text
    assert "Measured" not in text


def test_in_a_terminal_many_norms_are_a_few_rows_and_the_page_has_each(tmp_path) -> None:
    def unit() -> list[nn.Module]:
        return [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3), nn.Sigmoid()]

    net = nn.Sequential(*(layer for _ in range(10) for layer in unit())).eval()
    for norm in net[1::5]:
        norm.running_mean.fill_(1.0)
    result = batchnorm.fold(net, X)
    text, page = result.text(width=100), result.to_html(tmp_path / "fold.html").read_text()
    assert len(text.splitlines()) < 40
    assert "1 (one of 10 alike)" in text
    assert "Its scale and shift go back into the convolution 0." in text
    assert "3.84 k" in text  # ten times 2 × 3 × 8 × 8
    assert "3 (one of 10 alike)" in text
    assert "result.left has all" in " ".join(text.split())
    for words in ("What a pass takes", "[picture", "[plot"):
        assert words not in text
    for number in range(0, 50, 5):
        assert f"go back into the convolution {number}." in page
    assert "What a pass takes" in page
    assert "likewise" not in page


def test_the_data_holds_the_same_and_goes_through_json(result: FoldResult) -> None:
    data = json.loads(json.dumps(result.measure(X, seconds=0.01).to_dict(), allow_nan=False))
    assert data["folded"] == [
        {
            "norm": "1",
            "into": "0",
            "kind": "convolution",
            "way": "back",
            "sentence": "Its scale and shift go back into the convolution 0.",
            "crossed": [],
            "saving": {"multiply_adds": 288, "additions": 288, "bytes": 2304},
        }
    ]
    assert data["costs"]["before"]["operators"] == {"conv2d": 1, "batch_norm": 2, "tanh": 1, "sigmoid": 1}
    assert data["costs"]["after"]["operators"] == {"conv2d": 1, "batch_norm": 1, "tanh": 1, "sigmoid": 1}
    assert data["measured"]["rounds"] >= 7
    assert data["measured"]["before"]["median"] > 0


def test_the_page_has_the_pictures(result: FoldResult, tmp_path) -> None:
    page = result.to_html(tmp_path / "fold.html").read_text()
    assert page.count('<svg xmlns="http://www.w3.org/2000/svg" role="img"') == 2
    for words in ("conv2d + bias", "before", "after", "the norm, gone", "stands in its way"):
        assert words in page


def test_measuring_gives_another_result_and_costs_nothing_unasked(result: FoldResult) -> None:
    measured = result.measure(X, seconds=0.01)
    assert result.measured is None
    assert measured.model is result.model
    assert measured.measured is not None
    text = " ".join(str(measured).split())
    assert "latency, median" in text
    assert f"{measured.measured.rounds} rounds in which both ran in turn" in text
    assert "memory, peak" in text


def test_what_cannot_be_run_cannot_be_measured(result: FoldResult) -> None:
    with pytest.raises(InputError, match=r"the model fails on the inputs: RuntimeError: .*expected input"):
        result.measure(torch.randn(2, 5, 8, 8), seconds=0.01)


def test_where_nothing_was_folded_there_is_nothing_to_measure() -> None:
    result = batchnorm.fold(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3)).eval(), X)
    with pytest.raises(StateError, match="nothing was folded"):
        result.measure(X)
    assert result.costs is not None
    assert result.costs.before == result.costs.after


@pytest.mark.parametrize(("number", "shown"), [
    (0, "0"), (999, "999"), (1000, "1 k"), (-5340, "-5.34 k"), (123_456, "123 k"), (4_100_000_000, "4.1 G"),
    (999_999, "1 M"), (10**19, "10000000 T"),
])  # fmt: skip
def test_counts_for_a_person(number: int, shown: str) -> None:
    assert large(number) == shown


def test_bytes_for_a_person() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1536, -5 * 2**20)] == ["0 B", "1023 B", "1.5 KiB", "-5 MiB"]
