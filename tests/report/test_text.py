"""A document in a terminal holds everything, within the width."""

from __future__ import annotations

import pytest

from batchnorm.report import Document, Facts, Paragraph, Plot, Plots, Section, Series, Table
from batchnorm.report.short import shortened
from batchnorm.report.text import to_text, usual_width

PLOT = Plot("Loss", "step", "loss", [Series("a", [0, 1], [1.0, 2.0])])
DOCUMENT = Document(
    "Title",
    "Summary.",
    [
        Section(
            "First", [Facts([("error", 1.25e-6), ("missing", None)]), Paragraph("[bold]kept as it is[/bold]", "bad")]
        ),
        Section("Second", [Table(["layer[0]", "count"], [["a[red]", 3], ["b", None]], "T", "C", {1: "bad"})]),
        Section("", [PLOT, Plots([PLOT, PLOT])]),
    ],
)


def test_everything_is_there_and_nothing_is_taken_for_markup() -> None:
    text = to_text(DOCUMENT)
    for part in (
        "Title",
        "Summary.",
        "First",
        "1.25e-06",
        "–",
        "[bold]kept as it is[/bold]",
        "layer[0]",
        "a[red]",
        "T",
        "C",
    ):
        assert part in text
    assert "Loss" not in text  # a picture has no text, nor a stand-in


def test_stays_within_the_width() -> None:
    long = Document("t", "word " * 60, [Section("s", [Table(["a" * 30, "b"], [["x" * 90, "y " * 90]])])])
    assert max(map(len, to_text(long, width=60).splitlines())) <= 60


def test_a_section_may_be_brief_or_not_there_in_the_short_form() -> None:
    long = [Paragraph("all of it")]
    document = Document("t", "", [Section("One", long, brief=[Paragraph("in short")]), Section("Two", long, [])])
    text = to_text(shortened(document, "--verbose"))
    assert text.split() == ["t", "One", "in", "short"]
    assert to_text(document).split() == ["t", "One", *["all", "of", "it"], "Two", *["all", "of", "it"]]


@pytest.mark.parametrize(("columns", "expected"), [("100", 100), ("3", 20), ("0", 80), ("wide", 80), ("", 80)])
def test_columns_says_how_wide(monkeypatch: pytest.MonkeyPatch, columns: str, expected: int) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.__stdout__", None)  # no terminal that could be asked
    assert usual_width() == expected
    lines = to_text(Document("t", "word " * 100, [])).splitlines()
    assert expected - 5 < max(map(len, lines)) <= expected
