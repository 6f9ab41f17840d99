from __future__ import annotations

import pytest

from batchnorm.cli.errors import one_line, reason


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such file", "no such file."),
        ("a\n  b\tc.", "a b c."),
        ("did you mean 'bn'?", "did you mean 'bn'?"),
        ("no norm 'bm'; did you mean 'bn'?.", "no norm 'bm'; did you mean 'bn'?"),
    ],
)
def test_a_message_becomes_one_line_with_a_full_stop(text: str, line: str) -> None:
    assert one_line(text) == line


def test_a_message_without_end_is_cut() -> None:
    assert len(one_line("word " * 1000)) < 700
    assert one_line("word " * 1000).endswith("…")


def test_of_a_foreign_error_the_kind_and_the_first_line_are_told() -> None:
    assert reason(RuntimeError("\nsize mismatch.\nException raised from C++")) == "RuntimeError: size mismatch"
    assert reason(ValueError()) == "ValueError"
