from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm.checks.rules
from batchnorm.checks import RULES, Rule, check
from batchnorm.checks.rule import SECTIONS


def example(rule: type[Rule], section: str) -> dict[str, Any]:
    """Run the code block of a section of the rule's page."""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    block = rule.sections()[section]
    assert block.startswith("::\n")
    exec(re.sub(r"^    ", "", block.removeprefix("::\n"), flags=re.MULTILINE), names)
    return names


def test_codes_and_names_are_unique_and_well_formed() -> None:
    assert len({rule.code for rule in RULES}) == len({rule.name for rule in RULES}) == len(RULES)
    assert [rule.code for rule in RULES] == sorted(rule.code for rule in RULES)
    assert all(re.fullmatch(r"BN\d{3}", rule.code) for rule in RULES)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.name) for rule in RULES)


def test_every_file_is_a_rule_that_is_registered_under_its_name() -> None:
    files = Path(batchnorm.checks.rules.__file__).parent.glob("[!_]*.py")
    assert {file.stem.replace("_", "-") for file in files} == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", RULES)
def test_the_page_has_every_section(rule: type[Rule]) -> None:
    sections = rule.sections()
    assert tuple(sections) == SECTIONS
    assert all(len(text) > 40 for text in sections.values())
    assert rule.summary().endswith(".")


@pytest.mark.parametrize("rule", RULES)
def test_what_the_page_flags_is_flagged(rule: type[Rule]) -> None:
    names = example(rule, "Flagged")
    assert [f.code for f in check(names["model"], names["inputs"], select=rule.code).findings] == [rule.code]


@pytest.mark.parametrize("rule", RULES)
def test_what_the_page_recommends_is_not_flagged(rule: type[Rule]) -> None:
    names = example(rule, "Use instead")
    assert check(names["model"], names["inputs"], select=rule.code).findings == []


@pytest.mark.parametrize("rule", RULES)
def test_the_fix_of_the_flagged_example_is_as_safe_as_the_page_says(rule: type[Rule]) -> None:
    names = example(rule, "Flagged")
    (finding,) = check(names["model"], names["inputs"], select=rule.code).findings
    safety = "None" if finding.fix is None else "Safe" if finding.fix.safe else "Unsafe"
    assert re.match(rf"{safety}\b", rule.sections()["Fix safety"])
    if finding.fix is not None:
        fixed = check(names["model"], names["inputs"], select=rule.code).fix(unsafe=True)
        assert [f.code for f in fixed.applied] == [rule.code]
        assert check(fixed.model, names["inputs"], select=rule.code).findings == []
