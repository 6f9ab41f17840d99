"""From suspicions to findings: cause after cause is asked, and each answer is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from batchnorm.diagnosis.case import Case, Severity, Suspicion
from batchnorm.diagnosis.causes import CAUSES
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.diagnosis.judge import Verdict, judge
from batchnorm.diagnosis.probe import order_of
from batchnorm.diagnosis.result import Finding
from batchnorm.diagnosis.trial import Gain

__all__ = ["Accusations"]

_ORDER: dict[Severity, int] = {"fatal": 0, "wrong": 1, "doubtful": 2, "note": 3}


@dataclass
class Accusations:
    """Asks every cause about one model.

    Args:
        case: the model and what was measured.
        accused: whether a layer of some name may be called guilty.
    """

    case: Case
    accused: Callable[[str], bool]

    def findings(self) -> list[Finding]:
        """Return the faults, the worst first, then the notes."""
        found: list[Finding] = []
        for kind in CAUSES:
            accused = list(self._by(kind()))
            found += accused
            if accused and kind.alone:
                break
        return sorted(found, key=lambda finding: (_ORDER[finding.severity], finding.position))

    def _by(self, cause: Cause) -> Iterator[Finding]:
        case = self.case
        case.aside = cause.excluded(case)
        for suspicion in cause.find(case):
            guilty = tuple(filter(self.accused, suspicion.layers))
            if not guilty:
                continue
            if (suspicion.severity or cause.severity) == "note":
                yield self._finding(cause.key, "note", guilty, suspicion.evidence, suspicion.cure)
                continue
            verdict = judge(case, type(cause), suspicion)
            if verdict.harmless:
                case.harmless.update(guilty)
                continue
            case.hopeful |= verdict.hopeful
            if not verdict.hopeless:
                yield self._fault(cause, suspicion, guilty, verdict)
        case.aside = frozenset()

    def _fault(self, cause: Cause, suspicion: Suspicion, guilty: tuple[str, ...], verdict: Verdict) -> Finding:
        gain = None if verdict.trial is None else verdict.trial.gain
        evidence = suspicion.evidence + verdict.condemned
        return self._finding(cause.key, suspicion.severity or cause.severity, guilty, evidence, verdict.cure, gain)

    @cached_property
    def _order(self) -> dict[str, int]:
        return order_of(self.case.passes) or {layer.name: i for i, layer in enumerate(self.case.layers)}

    def _finding(
        self, key: str, severity: Severity, layers: Sequence[str], evidence: str, cure: str, gain: Gain | None = None
    ) -> Finding:
        order = self._order
        position = min((order.get(name, len(order)) for name in layers), default=len(order))
        return Finding(layers[0], key, severity, evidence, cure, gain, tuple(layers), position)
