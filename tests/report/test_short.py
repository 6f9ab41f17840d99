"""The short form has the rows that matter, says how many it left out, and no pictures."""

from __future__ import annotations

import pytest

from batchnorm.report import Diagrams, Document, HeatMap, Paragraph, Plot, Plots, Section, Table, foremost
from batchnorm.report.short import shortened


def short(*blocks):
    document = shortened(Document("t", "s", [Section("One", list(blocks))]), "--verbose")
    return [block for section in document.sections for block in section.blocks]


def table(count: int, **more) -> Table:
    return Table(["layer"], [[f"bn{i}"] for i in range(count)], **more)


def names(block: Table) -> list[str]:
    return [row[0] for row in block.rows]


@pytest.mark.parametrize("count", [0, 1, 10])
def test_few_rows_are_all_there(count: int) -> None:
    (found,) = short(table(count))
    assert (len(found.rows), found.rest) == (count, "")


def test_of_many_good_rows_the_first_are_shown_and_the_others_counted() -> None:
    (found,) = short(table(53))
    assert names(found) == ["bn0", "bn1", "bn2", "bn3", "bn4"]
    assert found.rest == "… and 48 more; --verbose shows all."


def test_bad_rows_are_shown_with_their_colours() -> None:
    (found,) = short(table(53, tones={7: "bad", 50: "bad", 1: "good"}))
    assert names(found) == ["bn7", "bn50"]
    assert found.tones == {0: "bad", 1: "bad"}


def test_a_verb_may_say_which_rows_matter() -> None:
    (found,) = short(table(53, shown=[52, 3], tones={7: "bad"}))
    assert names(found) == ["bn3", "bn52"]
    (found,) = short(table(53, shown=range(53)))
    assert (len(found.rows), found.rest) == (53, "")


def test_a_map_has_its_bad_rows_only() -> None:
    rows = [(f"bn{i}", [0.0]) for i in range(53)]
    assert short(HeatMap("m", rows, 1.0)) == []
    (found,) = short(HeatMap("m", rows, 1.0, tones={52: "bad"}))
    assert [name for name, _ in found.rows] == ["bn52"]
    assert "52 more" in found.rest


def test_pictures_are_left_out_and_sections_with_nothing_else() -> None:
    plot = Plot("p", "x", "y", [])
    assert short(plot, Plots([plot]), Diagrams([]), Paragraph("said")) == [Paragraph("said")]
    assert shortened(Document("t", "s", [Section("One", [plot])]), "m").sections == []


def test_the_foremost_rows_are_the_worst_of_the_bad() -> None:
    assert foremost([float(i) for i in range(30)], bad=range(20)) == list(range(10, 20))
    assert foremost([]) == []
