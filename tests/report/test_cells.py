"""Cells as a person reads them."""

from __future__ import annotations

import pytest

from batchnorm.report.cells import end_of_name, format_cell, is_numeric
from batchnorm.report.document import Cell


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (1234567, "1234567"),  # counts are whole
        (1234567.0, "1.235e+06"),
        (0.00012344, "0.0001234"),
        (-2.5, "-2.5"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("", ""),
        ("bn1", "bn1"),
    ],
)
def test_cells(cell: Cell, text: str) -> None:
    assert format_cell(cell) == text


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [([], False), ([None, "a"], False), ([True, False], False), ([None, 1], True), (["<0.001", 0.5], True)],
)
def test_a_column_with_a_number_is_one_of_numbers(cells: list[Cell], numeric: bool) -> None:
    assert is_numeric(iter(cells)) is numeric


@pytest.mark.parametrize(
    ("name", "most", "shown"),
    [
        ("a.b.c", 5, "a.b.c"),
        ("aa.bb.cc", 7, "….bb.cc"),  # whole parts where there is room
        ("aa.bb.cc", 6, "….cc"),
        ("aa.bb.cc", 4, "….cc"),
        ("x.abcdefghij", 6, "…fghij"),  # no part fits: the end of the last one
        ("abcdefghij", 4, "…hij"),
    ],
)
def test_of_a_long_name_the_last_parts_are_shown(name: str, most: int, shown: str) -> None:
    assert end_of_name(name, most) == shown
    assert len(shown) <= most
