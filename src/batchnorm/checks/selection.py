"""Which rules run, and in what order their findings come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Module

from batchnorm.checks.rule import Finding, Rule
from batchnorm.checks.rules import RULES
from batchnorm.checks.verify import in_mode
from batchnorm.dataflow.trace import trace
from batchnorm.errors import InputError, UnknownNameError, closest

__all__ = ["find", "select_rules"]


def select_rules(select: str | Sequence[str] | None, ignore: str | Sequence[str] | None) -> tuple[type[Rule], ...]:
    """Return the rules that ``select`` names (for None, those that run by default) without those ``ignore`` names.

    Of the rules that do not run by default, only a whole code or a name selects one; a beginning may well ignore it.

    Raises:
        UnknownNameError: a name is no rule's code, name, or beginning of a code.

    >>> [rule.code for rule in select_rules(["BN001", "norm-after-relu"], ignore="BN001")]
    ['BN002']
    """
    chosen = {rule for rule in RULES if rule.by_default} if select is None else _named(select)
    ignored = set() if ignore is None else _named(ignore, off_too=True)
    return tuple(rule for rule in RULES if rule in chosen - ignored)


def _named(names: str | Sequence[str], *, off_too: bool = False) -> set[type[Rule]]:
    chosen: set[type[Rule]] = set()
    for name in [names] if isinstance(names, str) else names:
        code = name.upper()
        found = {
            rule
            for rule in RULES
            if code == rule.code
            or name.lower() == rule.name
            or ((off_too or rule.by_default) and code.startswith("BN") and rule.code.startswith(code))
        }
        if not found:
            known = [known for rule in RULES for known in (rule.code, rule.name)]
            hint = closest(code, known) or closest(name.lower(), known)
            raise UnknownNameError(
                f"{name!r}: no rule of that code or name{hint or '.'} The rules are "
                f"{', '.join(f'{rule.code} ({rule.name})' for rule in RULES)}."
            )
        chosen |= found
    return chosen


def find(model: Module, example_inputs: Any, rules: Sequence[type[Rule]]) -> list[Finding]:
    """Return what the rules find, in order of execution; what is found at each call of a shared layer counts once."""
    graph = trace(model, example_inputs)
    ready = [rule() for rule in rules]
    found: dict[tuple[str, str, str], Finding] = {}
    for rule in ready:
        for finding in rule.find(model, graph):
            found.setdefault((finding.code, finding.layer, finding.message), finding)
    asking = [rule for rule in ready if model.training and rule.needs_eval(model, graph)]
    for finding in _in_eval(model, example_inputs, asking) if asking else ():
        found.setdefault((finding.code, finding.layer, finding.message), finding)
    return sorted(found.values(), key=lambda finding: (finding.position, finding.code))


def _in_eval(model: Module, example_inputs: Any, rules: Sequence[Rule]) -> list[Finding]:
    with in_mode(model, training=False):
        try:
            graph = trace(model, example_inputs)
        except InputError:  # it runs in training mode only, and that is not what is asked
            return []
        return [finding for rule in rules for finding in rule.find_in_eval(model, graph)]
