from __future__ import annotations

import pytest

from batchnorm.checks import RULES
from batchnorm.checks.selection import select_rules
from batchnorm.errors import UnknownNameError


@pytest.mark.parametrize(
    ("select", "ignore", "expected"),
    [
        (None, None, [rule.code for rule in RULES if rule.by_default]),
        ("BN001", None, ["BN001"]),
        (["dropout-before-norm", "bn002"], None, ["BN002", "BN004"]),
        ("BN", ["BN001", "BN0"], []),
        ("BN", None, [rule.code for rule in RULES if rule.by_default]),
        (["BN01", "bn015"], "BN012", ["BN010", "BN011", "BN013", "BN014", "BN015"]),
        ("norm-after-activation", None, ["BN015"]),
        ("BN015", "BN01", []),
        (["BN001", "BN002", "BN003", "BN004"], ["BN001", "BN003", "norm-after-relu"], ["BN004"]),
    ],
)
def test_rules_are_chosen_by_code_name_or_beginning(
    select: str | list[str] | None, ignore: str | list[str] | None, expected: list[str]
) -> None:
    assert [rule.code for rule in select_rules(select, ignore)] == expected


@pytest.mark.parametrize(("name", "hint"), [("BN0066", "BN006"), ("bias-befor-norm", "bias-before-norm")])
def test_an_unknown_name_is_refused_with_the_closest(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"{name}.*did you mean '{hint}'\? The rules are"):
        select_rules(name, None)
    with pytest.raises(UnknownNameError, match="no rule of that code or name"):
        select_rules(None, ["BN001", name])


def test_an_empty_beginning_is_no_name() -> None:
    with pytest.raises(UnknownNameError):
        select_rules("", None)
