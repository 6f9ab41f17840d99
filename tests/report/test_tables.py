"""Tables break lines between words only, whatever the width."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchnorm.report import Document, Facts, Section, Table
from batchnorm.report.short import shortened
from batchnorm.report.tables import widths
from batchnorm.report.text import to_text

NAME = "backbone.layer3.12.conv_block.bn2"
WIDE = Table(
    ["norm", "verdict", "samples", "effective", "distance", "worst channel"],
    [
        [NAME, "as stored", 12345, 123, 0.01234, "41: +0.15 σ (2.4 s.e.), variance × 0.99"],
        ["b", "drifted", 1, 2, 3, ""],
    ],
    optional=["effective", "samples"],
)
texts = st.lists(st.text(alphabet="abc .", max_size=30), min_size=1, max_size=4)


@given(columns=st.lists(texts, min_size=1, max_size=6), room=st.integers(1, 120))
def test_columns_hold_their_longest_word_and_stay_in_the_room(columns: list[list[str]], room: int) -> None:
    found = widths(columns, room)
    longest = [max((len(word) for text in column for word in text.split()), default=0) for column in columns]
    between = 2 * (len(columns) - 1)
    if found is None:
        assert any(len(text) > 44 for column in columns for text in column) or sum(longest) + between > room
    else:
        assert sum(found) + between <= room
        assert all(width >= word for width, word in zip(found, longest, strict=True))


@given(
    names=st.lists(st.from_regex(r"[a-z]{1,12}(\.[a-z0-9_]{1,10}){0,3}", fullmatch=True), min_size=1, max_size=5),
    headers=st.lists(st.from_regex(r"[a-z]{1,10}( [a-z]{1,10}){0,2}", fullmatch=True), min_size=1, max_size=7),
    width=st.sampled_from([80, 120]),
)
def test_no_word_is_broken_in_a_grid_or_in_records(names: list[str], headers: list[str], width: int) -> None:
    rows = [[name, *(f"{0.1234 * i:.3g} σ of it" for i, _ in enumerate(headers))] for name in names]
    text = to_text(Document("t", "", [Section("", [Table(["layer", *headers], rows)])]), width)
    assert max(map(len, text.splitlines())) <= width
    words = text.replace(":", " ").split()
    assert set(names) <= set(words)
    assert {word for header in headers for word in header.split()} <= set(words)


def test_a_short_form_does_without_the_least_important_columns_and_says_so() -> None:
    document = Document("t", "", [Section("", [WIDE])])
    text = to_text(shortened(document, "--verbose"), 70)
    assert NAME in text
    assert "No room for: effective, samples; --verbose shows all." in text
    assert "12345" not in text
    assert "0.01234" in text
    wide = to_text(shortened(document, "--verbose"), 140)
    assert "No room" not in wide
    assert "12345" in wide


def test_the_whole_form_has_every_cell_as_records_where_columns_find_no_room() -> None:
    lines = to_text(Document("t", "", [Section("", [WIDE])]), 60).splitlines()
    assert f"norm {NAME}" in lines
    assert "  samples: 12345" in lines
    assert "  worst channel: 41: +0.15 σ (2.4 s.e.), variance × 0.99" in lines


def test_facts_stand_beside_their_names_or_below_each_other() -> None:
    facts = Facts([("a name of a fact", "a.very.long.name.that.is.one.word"), ("other", 3)])
    document = Document("t", "", [Section("", [facts])])
    assert "a name of a fact  a.very.long.name.that.is.one.word" in to_text(document, 80)
    narrow = to_text(document, 34)
    assert "a.very.long.name.that.is.one.word" in narrow
    assert "other: 3" in narrow
