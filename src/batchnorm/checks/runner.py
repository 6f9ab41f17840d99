"""Check a model, rule by rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from batchnorm.checks.fix import FixResult, apply_fixes
from batchnorm.checks.rule import Finding, Rule
from batchnorm.checks.sarif import sarif_log
from batchnorm.checks.selection import find, select_rules
from batchnorm.models.preconditions import require_readable
from batchnorm.models.transaction import transaction
from batchnorm.nn.provenance import with_provenance
from batchnorm.report import Document, Paragraph, Result, Section, Table

__all__ = ["CheckResult", "check"]


@transaction("check")
@with_provenance("check")
def check(
    model: Module,
    example_inputs: Any,
    *,
    select: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
) -> CheckResult:
    """Look for misplaced and misused norms.

    The model is run in the modes it is in, and its dataflow is read, so that functional norms, activations and
    code between modules count as much as modules do. The model is left as it was. Each rule has a page, its docstring:
    ``print(batchnorm.checks.RULES[0].page())``.

    Args:
        model: any model that runs.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        select: run only these rules: codes (``"BN001"``), beginnings of codes (``"BN"``) or names
            (``"bias-before-norm"``). A rule that is off by default runs if its whole code or its name is here.
        ignore: leave these rules out.

    Returns:
        The findings in order of execution. ``fix()`` mends what can be mended, in a copy; ``to_sarif()`` is for
        tools that collect findings.

    Raises:
        UnknownNameError: a rule of that code or name does not exist.
        InputError: the model fails on the inputs.
        StateError: the model is scripted, or lazy and not yet initialized.

    Example:
        >>> import torch
        >>> from batchnorm.checks import check
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> result = check(model, torch.randn(2, 3, 8, 8))
        >>> [(finding.code, finding.layer) for finding in result.findings]
        [('BN001', '0')]
        >>> fixed = result.fix()
        >>> fixed.model[0].bias is None, len(check(fixed.model, torch.randn(2, 3, 8, 8)).findings)
        (True, 0)
    """
    require_readable("check", model)
    rules = select_rules(select, ignore)
    return CheckResult(find(model, example_inputs, rules), rules, model, example_inputs)


@dataclass(frozen=True, eq=False, repr=False)
class CheckResult(Result):
    """What :func:`check` found.

    Attributes:
        findings: in order of execution.
        rules: the rules that ran.
    """

    findings: list[Finding]
    rules: tuple[type[Rule], ...]
    _model: Module
    _inputs: Any

    @transaction("check().fix", lambda result: result._model.modules())
    @with_provenance("check().fix", lambda result: result._model)
    def fix(self, *, unsafe: bool = False) -> FixResult:
        """Mend what can be mended, in a copy of the model.

        Safe fixes keep what the model computes, in eval and in training mode, which is verified on the example inputs.
        Unsafe ones change it, and the model has to be trained or recalibrated afterwards. A fix can make way for
        another, so the model is checked again until nothing is left to be done.

        Args:
            unsafe: apply unsafe fixes too.

        Returns:
            The new model, and which findings are gone or still there.
        """
        return apply_fixes(self._model, self._inputs, self.rules, unsafe=unsafe)

    def to_sarif(self, *, source: str | None = None) -> dict[str, Any]:
        """Return the findings as a SARIF 2.1.0 log, ready for ``json.dumps``.

        Args:
            source: path or URI of the file that defines the model; some viewers show only what has one.
        """
        return sarif_log(self.findings, self.rules, type(self._model).__name__, source)

    def document(self) -> Document:
        """Return one table of findings and one of advice."""
        if not self.findings:
            return Document("Check", f"No findings; {len(self.rules)} rules ran.", [], "good")
        rows = [(f.code, f.layer or "(the model)", f.message, _fixable(f)) for f in self.findings]
        advice = dict.fromkeys((f.code, f.name, f.advice) for f in self.findings)
        counts = Counter(f.code for f in self.findings)
        fixable = sum(f.fix is not None and f.fix.safe for f in self.findings)
        unsafe = sum(f.fix is not None and not f.fix.safe for f in self.findings)
        sections = [
            Section("", [Table(("rule", "layer", "finding", "fix"), rows, shown=range(len(rows)))]),
            Section("What to do", [Table(("rule", "name", "advice"), list(advice), shown=range(len(advice)))]),
        ]
        if fixable or unsafe:
            text = f"{fixable} of {len(self.findings)} can be fixed safely" + f", {unsafe} by unsafe fixes." * bool(
                unsafe
            )
            text = text.rstrip(".") + "."
            sections.append(Section("", [Paragraph(text)]))
        found = ", ".join(f"{code}: {count}" for code, count in sorted(counts.items()))
        summary = f"{len(self.findings)} finding{'s' * (len(self.findings) != 1)} ({found})."
        return Document("Check", summary, sections, "bad")

    def to_dict(self) -> dict[str, Any]:
        """Return the findings and the codes of the rules that ran."""
        return {"findings": [f.to_dict() for f in self.findings], "rules": [rule.code for rule in self.rules]}


def _fixable(finding: Finding) -> str:
    if finding.fix is None:
        return "by hand"
    return "safe" if finding.fix.safe else "unsafe"
