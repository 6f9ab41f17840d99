"""Apply fixes to a copy of a model, and keep those that hold what they promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from batchnorm.checks.rule import Finding, Rule
from batchnorm.checks.selection import find
from batchnorm.checks.verify import Comparison, trace_in_mode
from batchnorm.dataflow.sizes import runs_of
from batchnorm.dataflow.trace import trace
from batchnorm.errors import BatchNormError, VerificationError
from batchnorm.models.copying import copy_model
from batchnorm.report import Document, Result, Section, Table
from batchnorm.verification.end_to_end import Agreement

__all__ = ["FixResult", "LeftFinding", "apply_fixes"]


@dataclass(frozen=True)
class LeftFinding:
    """A finding that is still there, and why."""

    finding: Finding
    reason: str


@dataclass(frozen=True, eq=False, repr=False)
class FixResult(Result):
    """What fixing did.

    Attributes:
        model: the mended copy.
        applied: the findings that were fixed, in the order in which it was done.
        left: those that are still there, each with a reason.
        renamed: old keys of the state dict with their new ones.
        dropped: keys that it has lost.
        notes: what could not be verified, as sentences.
        error: the greatest difference of an output that the safe fixes made in eval mode, by rounding; None if there
            were none. It was measured before unsafe fixes.
        bound: what rounding allows that output, see :mod:`batchnorm.verification.end_to_end`.
    """

    model: Module
    applied: list[Finding]
    left: list[LeftFinding]
    renamed: dict[str, str]
    dropped: list[str]
    notes: list[str]
    error: float | None = None
    bound: float | None = None

    def document(self) -> Document:
        """Return one table of what was fixed and one of what was left."""
        sections = []
        if self.applied:
            rows = [(f.code, f.layer or "(the model)", f.fix.description, f.fix.safe) for f in self.applied if f.fix]
            sections.append(Section("Fixed", [Table(("rule", "layer", "fix", "safe"), rows)]))
        if self.left:
            kept = [(e.finding.code, e.finding.layer or "(the model)", e.reason) for e in self.left]
            sections.append(Section("Left", [Table(("rule", "layer", "reason"), kept)]))
        if self.notes:
            sections.append(Section("Notes", [Table(("note",), [(note,) for note in self.notes])]))
        summary = f"{len(self.applied)} finding{'s' * (len(self.applied) != 1)} fixed, {len(self.left)} left."
        if self.error is not None:
            summary += (
                f" The safe fixes moved the output by {self.error:.3g} at most; rounding allows {self.bound:.3g}."
            )
        return Document("Fix", summary, sections)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model."""
        return {
            "applied": [finding.to_dict() for finding in self.applied],
            "left": [{**entry.finding.to_dict(), "reason": entry.reason} for entry in self.left],
            "renamed": dict(self.renamed),
            "dropped": list(self.dropped),
            "notes": list(self.notes),
            "error": self.error,
            "bound": self.bound,
        }


def apply_fixes(model: Module, inputs: Any, rules: Sequence[type[Rule]], *, unsafe: bool) -> FixResult:
    """Fix a copy of ``model`` until no rule finds anything that could still be fixed."""
    fixer = _Fixer(_copy(model), inputs, rules)
    while True:
        findings = find(fixer.model, inputs, rules)
        todo = [f for f in findings if f.fix is not None and (f.fix.safe or unsafe) and _key(f) not in fixer.tried]
        if not todo:
            break
        safe = [f for f in todo if f.fix is not None and f.fix.safe]
        fixer.attempt(safe or todo)  # what is safe is verified together, before anything changes the model
    left = [LeftFinding(f, fixer.failed.get(_key(f)) or _reason(f)) for f in findings]
    error, bound = (None, None) if fixer.agreement is None else (fixer.agreement.error, fixer.agreement.bound)
    return FixResult(
        fixer.model, fixer.applied, left, fixer.renamed, fixer.dropped, list(fixer.notes), error=error, bound=bound
    )


def _key(finding: Finding) -> tuple[str, str]:
    return finding.code, finding.layer


def _reason(finding: Finding) -> str:
    if finding.fix is None:
        return f"There is no automatic fix. {finding.advice}"
    return "Its fix is unsafe: it changes what the model computes. Pass unsafe=True to apply it."


def _copy(model: Module) -> Module:
    return copy_model("fix", model, "Fixes are applied to a copy: take off the model what cannot be copied.")


class _Fixer:
    """A model, and the fixes that were tried on it."""

    def __init__(self, model: Module, inputs: Any, rules: Sequence[type[Rule]]) -> None:
        self.model = model
        self.applied: list[Finding] = []
        self.renamed: dict[str, str] = {}
        self.dropped: list[str] = []
        self.agreement: Agreement | None = None
        self.tried: set[tuple[str, str]] = set()
        self.failed: dict[tuple[str, str], str] = {}
        self.notes: dict[str, None] = {}
        self._inputs = inputs
        self._runs = runs_of("fix", model, inputs)
        self._rules = rules

    def attempt(self, findings: Sequence[Finding]) -> None:
        """Fix them together or, if that does not work, one by one."""
        self.tried.update(map(_key, findings))
        if len(findings) > 1 and self._apply(findings) is None:
            return
        for finding in findings:
            reason = self._apply([finding])
            if reason is not None:
                self.failed[_key(finding)] = reason

    def _apply(self, findings: Sequence[Finding]) -> str | None:
        """Apply the fixes to a copy and keep it if they hold; return why they do not."""
        candidate = _copy(self.model)
        fixes = [finding.fix for finding in findings if finding.fix is not None]
        try:
            changes = [fix.apply(candidate) for fix in fixes]
            dropped = [key for change in changes for key in change.dropped]
            if all(fix.safe for fix in fixes):
                self._prove(candidate, findings, dropped)
            else:
                trace(candidate, self._inputs)  # whatever it computes now, it has to run
        except VerificationError as error:
            return str(error)
        except BatchNormError as error:
            return f"The fix fails: {error}"
        self.model = candidate
        self.applied += findings
        self.dropped += dropped
        self.renamed.update({old: new for change in changes for old, new in change.renamed.items()})
        return None

    def _prove(self, candidate: Module, findings: Sequence[Finding], dropped: Sequence[str]) -> None:
        """Compare the candidate with the model in both modes; raises VerificationError."""
        comparison = Comparison(self.model, candidate, self._runs, findings, self._rules, dropped)
        agreement = comparison.in_mode(training=False)
        try:
            trace_in_mode(self.model, self._inputs, training=True)
        except BatchNormError as error:
            note = f"Not verified in training mode, in which the model fails on the example inputs. {error}"
            self.notes[note] = None
        else:
            comparison.in_mode(training=True)
        if self.agreement is None or agreement.error > self.agreement.error:
            self.agreement = agreement
