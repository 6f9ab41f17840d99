"""Which data has which form."""

from __future__ import annotations

import math

import pytest

from batchnorm.folding.writing.forms import (
    by_name,
    is_bool,
    is_count,
    is_name,
    is_number,
    is_number_from_zero,
    is_parameter,
    is_size,
    is_text,
    list_of,
    one_of,
    or_none,
)

VALUES = {"none": None, "true": True, "-1": -1, "0": 0, "3": 3, "huge": 2**40, "half": 0.5, "nan": math.nan,
          "inf": math.inf, "empty": "", "name": "a.b", "dots": "..", "list": [], "table": {}}  # fmt: skip


@pytest.mark.parametrize(("holds", "which"), [
    (is_text, "empty name dots"),
    (is_name, "empty name"),
    (is_parameter, "name"),
    (is_bool, "true"),
    (is_size, "0 3"),
    (is_count, "3"),
    (is_number, "-1 0 3 huge half"),
    (is_number_from_zero, "0 3 huge half"),
    (or_none(is_count), "none 3"),
    (one_of("a.b", "c"), "name"),
    (list_of(is_size), "list"),
    (by_name(is_size), "table"),
])  # fmt: skip
def test_a_form_is_of_these_values_alone(holds, which):
    assert {key for key, value in VALUES.items() if holds(value)} == set(which.split())


def test_lists_and_tables_of_forms():
    assert list_of(is_size, 2)([1, 2])
    assert not list_of(is_size, 2)([1])
    assert not list_of(is_size)([1, -1])
    assert by_name(is_size)({"a": 1, "": 2})
    assert not by_name(is_size, is_parameter)({"": 2})
    assert not by_name(is_size)({"a": "1"})
