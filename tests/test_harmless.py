from __future__ import annotations

import unicodedata
from collections import namedtuple
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.harmless import harmless, harmless_data


@given(st.text())
def test_nothing_that_does_something_is_left_and_all_else_is_as_it_was(text: str) -> None:
    shown = harmless(text)
    assert not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in shown)
    assert harmless(shown) == shown
    if text.isprintable():
        assert shown == text
    assert "\n" not in shown
    assert harmless(text, lines=True).count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;a\x07", "\\x1b]0;a\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\u200b\ufeff\U000e0041", "\\u200b\\ufeff\\U000e0041"),
        ("\u2028\x85", "\\u2028\\x85"),
        ("\ud800", "\\ud800"),
        ("σ² × 1\u00a0%", "σ² × 1\u00a0%"),
    ],
)
def test_characters_are_shown_as_in_a_string_of_python(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_data_is_looked_through() -> None:
    @dataclass(frozen=True)
    class Row:
        names: tuple[str, ...]
        counts: dict[str, list[float]]

    Pair = namedtuple("Pair", "a b")
    assert harmless_data(Row(("\r",), {"\x1b": [1.5]})) == Row(("\\r",), {"\\x1b": [1.5]})
    assert harmless_data([Pair(1, 2), None, True]) == [Pair(1, 2), None, True]
