"""Of which norms the same is told, whatever they and their neighbours are called."""

from __future__ import annotations

import pytest

from batchnorm.folding.report.same_sentence import group_by_sentence

NAMES = {"a", "b", "conv", "0", "7"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It goes back into the convolution a.", "It goes back into the convolution features.b."),
        ("It reads relu in 0.", "It reads relu in 7."),
        ("It is also read by cat in a, cat in b and 3 more.", "It is also read by cat in b and cat in a."),
        ("Of its scales 26 of 64 are negative.", "Of its scales 1 of 8 are negative."),
        ("It goes on into a and b.", "It goes on into b."),
    ],
)
def test_names_and_how_many_there_are_make_no_difference(one: str, other: str) -> None:
    assert group_by_sentence([one, other], str, NAMES) == [[one, other]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It reads relu in a.", "It reads tanh in a."),
        ("It goes into the convolution conv.", "It goes into the linear layer conv."),
        ("It is read by cat in a and 3 more.", "It is read by cat in a and add in b."),
    ],
)
def test_operators_and_kinds_do(one: str, other: str) -> None:
    assert group_by_sentence([one, other], str, NAMES) == [[one], [other]]
