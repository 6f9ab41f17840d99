"""Which rules run, and in what order their findings come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Module

from batchnorm.checks.rule import Finding, Rule
from batchnorm.checks.rules import RULES
from batchnorm.errors import UnknownNameError, closest
from batchnorm.graph.trace import trace

__all__ = ["find", "select_rules"]


def select_rules(select: str | Sequence[str] | None, ignore: str | Sequence[str] | None) -> tuple[type[Rule], ...]:
    """Return the rules that ``select`` names (all of them for None) without those that ``ignore`` names.

    Raises:
        UnknownNameError: a name is no rule's code, name, or beginning of a code.

    >>> [rule.code for rule in select_rules(["BN001", "norm-after-relu"], ignore="BN001")]
    ['BN002']
    """
    chosen = set(RULES) if select is None else _named(select)
    ignored = set() if ignore is None else _named(ignore)
    return tuple(rule for rule in RULES if rule in chosen - ignored)


def _named(names: str | Sequence[str]) -> set[type[Rule]]:
    chosen: set[type[Rule]] = set()
    for name in [names] if isinstance(names, str) else names:
        code = name.upper()
        found = {
            rule
            for rule in RULES
            if rule.name == name.lower() or (code.startswith("BN") and rule.code.startswith(code))
        }
        if not found:
            known = [known for rule in RULES for known in (rule.code, rule.name)]
            hint = closest(code, known) or closest(name.lower(), known)
            raise UnknownNameError(
                f"{name!r}: no rule of that code or name{hint}. The rules are "
                f"{', '.join(f'{rule.code} ({rule.name})' for rule in RULES)}."
            )
        chosen |= found
    return chosen


def find(model: Module, example_inputs: Any, rules: Sequence[type[Rule]]) -> list[Finding]:
    """Return what the rules find, in order of execution; what is found at each call of a shared layer counts once."""
    graph = trace(model, example_inputs)
    found: dict[tuple[str, str, str], Finding] = {}
    for rule in rules:
        for finding in rule().find(model, graph):
            found.setdefault((finding.code, finding.layer, finding.message), finding)
    return sorted(found.values(), key=lambda finding: (finding.position, finding.code))
