from __future__ import annotations

import pytest

from batchnorm.cli.errors import CommandError
from batchnorm.cli.load.numbers import read_numbers


@pytest.mark.parametrize(("text", "numbers"), [
    ("0.5", [0.5]), ("1,2e-3, -3 ", [1.0, 0.002, -3.0]), (None, None)
])  # fmt: skip
def test_numbers_between_commas(text, numbers) -> None:
    assert read_numbers("--input-mean", text) == numbers


@pytest.mark.parametrize("text", ["", "1,two", "1,,2", "1;2", "nan", "1,inf"])
def test_other_text_is_refused_with_an_example(text) -> None:
    with pytest.raises(CommandError, match=r"--input-std .*: expected a number, .* such as 123\.7,116\.3,103\.5\."):
        read_numbers("--input-std", text)
