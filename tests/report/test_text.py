"""A document in a terminal holds everything, within the width."""

from __future__ import annotations

from batchnorm.report import Document, Facts, Paragraph, Plot, Plots, Section, Series, Table
from batchnorm.report.text import to_text

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
    assert text.count("[plot: Loss]") == 3


def test_stays_within_the_width() -> None:
    long = Document("t", "word " * 60, [Section("s", [Table(["a" * 30, "b"], [["x" * 90, "y " * 90]])])])
    assert max(map(len, to_text(long, width=60).splitlines())) <= 60


def test_a_section_may_be_brief_in_a_terminal_or_not_there() -> None:
    long = [Paragraph("all of it")]
    text = to_text(Document("t", "", [Section("One", long, brief=[Paragraph("in short")]), Section("Two", long, [])]))
    assert text.split() == ["t", "One", "in", "short"]
