"""The tour as a report: each station, its figures, and whether all is well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchnorm.demo.result import DemoResult
from batchnorm.demo.stations import Frozen, Stations
from batchnorm.demo.story import tell
from batchnorm.report import Facts, Paragraph, Plot, Section, Table


def section(tour: Stations, title: str) -> Section:
    (found,) = (section for section in tell(tour).sections if section.title == title)
    return found


def blocks(tour: Stations, title: str, kind: type) -> list[Any]:
    return [block for block in section(tour, title).blocks if isinstance(block, kind)]


def test_the_stations_come_in_their_order(stations: DemoResult) -> None:
    document = tell(stations)
    assert document.tone == "good"
    assert document.summary == ("digits: 1,347 training and 450 test pictures, 90 steps of 60, seed 3, 12 s in all.")
    assert [section.title for section in document.sections] == [
        *("In short", "Train", "Look inside", "Measure the population"),
        *("Freeze", "Fold and verify", "Check and place", "Watch"),
    ]


def test_in_short(stations: DemoResult) -> None:
    (facts,) = blocks(stations, "In short", Facts)
    told = dict(facts.items)
    # the plain network's best is 80 %, first at its second look; the winner has it at its first
    assert told["best accuracy of the plain network (80.0 %) reached by it after"] == "30 steps"
    assert told["… and by the network with norms after"] == "10 steps"
    assert told["norms folded away"] == "1 of 1"
    assert told["a forward pass is faster by"] == "1.25 ×"
    assert told["pictures flagged by the watch"] == "inverted"


def test_a_winner_that_never_gets_there_is_told(stations: DemoResult) -> None:
    stations.winner = replace(stations.winner, probes=[replace(p, accuracy=0.1) for p in stations.winner.probes])
    (facts,) = blocks(stations, "In short", Facts)
    assert dict(facts.items)["… and by the network with norms after"] == "never"


def test_training_tells_every_run_and_every_rate_that_was_tried(stations: DemoResult) -> None:
    (table,) = blocks(stations, "Train", Table)
    assert table.rows[1] == ["with norm, lr 0.5", "95.0 %", "95.0 %", 30, 0.125]
    assert table.rows[0][3] is None  # 90 % were not reached
    (text,) = blocks(stations, "Train", Paragraph)
    assert "0.5 → 0.250, 2.5 → nan. It likes 0.5 best; the larger rate is 2.5." in text.text
    (plot,) = blocks(stations, "Train", Plot)
    assert [series.style for series in plot.series] == ["dashed", "line"] * 2
    assert plot.series[1].x == [10, 30, 90]


def test_inside_the_two_networks_of_the_best_rate_are_compared(stations: DemoResult) -> None:
    percentiles, saturated = blocks(stations, "Look inside", Plot)
    assert [series.name for series in percentiles.series] == [
        f"{name}, lr 0.5, {p} %" for name in ("plain", "with norm") for p in (15, 50, 85)
    ]
    assert [series.y for series in percentiles.series[3:]] == [[-1.0] * 3, [0.0] * 3, [1.0] * 3]
    assert len({series.group for series in percentiles.series}) == 2
    assert [series.y for series in saturated.series] == [[0.25] * 3] * 4  # of all runs


def test_a_freeze_that_does_not_hold_is_no_good_end(stations: DemoResult) -> None:
    stations.frozen = Frozen(stations.frozen.result, False)
    (text,) = blocks(stations, "Freeze", Paragraph)
    assert (text.tone, text.text.endswith("the statistics are changed.")) == ("bad", True)
    assert tell(stations).tone == "bad"


@pytest.mark.parametrize("which", [(1, 1), (0, 0), (1, 0)])
def test_the_end_is_good_only_if_the_changed_pictures_alone_are_flagged(
    stations: DemoResult, which: tuple[int, int]
) -> None:
    seen = [row.result for row in stations.watched]
    stations.watched = [replace(row, result=seen[i]) for row, i in zip(stations.watched, which, strict=True)]
    assert tell(stations).tone == "bad"


def test_the_watch_compares_sets_of_pictures(stations: DemoResult) -> None:
    verdicts, saturated = blocks(stations, "Watch", Table)
    assert verdicts.rows == [
        ["as in training", "as in training", "0 of 1", "50.0 %"],
        ["inverted", "drifted", "1 of 1", "50.0 %"],
    ]
    assert verdicts.tones == {0: "good", 1: "bad"}
    assert saturated.columns == ["pictures", "sigmoid 1"]
    (plot,) = blocks(stations, "Watch", Plot)
    assert [series.name for series in plot.series] == ["as in training", "inverted", "tolerance"]


def test_the_fold_is_told_without_what_int8_would_need(stations: DemoResult) -> None:
    titles = [getattr(block, "title", "") for block in section(stations, "Fold and verify").blocks]
    assert not any("int8" in title for title in titles)
    (*_, table) = blocks(stations, "Fold and verify", Table)
    assert table.rows == [["with norms, eval mode", 50.0, "92.5 %"], ["folded", 40.0, "92.5 %"]]
