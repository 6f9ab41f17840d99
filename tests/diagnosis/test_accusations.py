"""Every cause is asked, and the faults come in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from tests.diagnosis.case_of import case_of, gap

import batchnorm
from batchnorm.diagnosis import accusations
from batchnorm.diagnosis.accusations import Accusations
from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.diagnosis.judge import Verdict


def test_names_are_those_that_may_be_accused(net, batches) -> None:
    net.bn2.reset_running_stats()
    net.bn4.reset_running_stats()
    (finding,) = batchnorm.diagnose(net, batches, names="bn4").findings
    assert (finding.layer, finding.layers) == ("bn4", ("bn4",))
    assert batchnorm.diagnose(net, batches, names="bn1").healthy


def test_two_faults_are_two_findings_the_fatal_one_first(net, batches) -> None:
    net.bn1.reset_running_stats()
    net.bn4.running_var[0] = torch.inf
    findings = batchnorm.diagnose(net, batches).findings
    assert [(f.cause, f.layer) for f in findings] == [("poisoned", "bn4"), ("never_updated", "bn1")]


class Told(Cause):
    """Tells what a test gives it."""

    key = "told"
    suspicions: ClassVar[list[Suspicion]] = []

    def find(self, case: Case) -> Iterator[Suspicion]:
        yield from self.suspicions


def causes(monkeypatch: pytest.MonkeyPatch, *told: tuple[str, str, list[Suspicion], bool]) -> None:
    """Let these be all causes: key, severity, what each finds, and whether it ends the search."""
    kinds = [
        type("One", (Told,), {"key": key, "severity": severity, "suspicions": found, "alone": alone})
        for key, severity, found, alone in told
    ]
    monkeypatch.setattr(accusations, "CAUSES", tuple(kinds))


def found_by(case: Case, accused: Any = lambda name: True) -> list[tuple[str, str, tuple[str, ...]]]:
    vars(one := Accusations(case, accused))["_order"] = {"a": 0, "b": 1, "c": 2}
    return [(finding.cause, finding.severity, finding.layers) for finding in one.findings()]


def suspect(*layers: str, **options: Any) -> Suspicion:
    return Suspicion(layers, "evidence", "cure()", **options)


@pytest.fixture
def case() -> Case:
    return case_of(gap("a"), gap("b"), gap("c"))


def test_the_worst_come_first_and_then_those_that_run_first(case, monkeypatch) -> None:
    causes(
        monkeypatch,
        ("note", "note", [suspect("a")], False),
        ("doubt", "doubtful", [suspect("a")], False),
        ("late", "wrong", [suspect("c", "b")], False),
        ("early", "wrong", [suspect("a", "c"), suspect("elsewhere")], False),
        ("worst", "fatal", [suspect("c")], False),
        ("raised", "note", [suspect("b", severity="fatal")], False),
    )
    assert found_by(case) == [
        ("raised", "fatal", ("b",)),
        ("worst", "fatal", ("c",)),
        ("early", "wrong", ("a", "c")),
        ("late", "wrong", ("c", "b")),
        ("early", "wrong", ("elsewhere",)),
        ("doubt", "doubtful", ("a",)),
        ("note", "note", ("a",)),
    ]


def test_a_cause_that_stands_alone_ends_the_search_if_it_found_something(case, monkeypatch) -> None:
    for suspicions, keys in (([suspect("a")], ["alone"]), ([], ["next"])):
        causes(monkeypatch, ("alone", "fatal", suspicions, True), ("next", "wrong", [suspect("b")], False))
        assert [cause for cause, _, _ in found_by(case)] == keys


def test_layers_that_may_not_be_accused_are_left_out(case, monkeypatch) -> None:
    causes(monkeypatch, ("cause", "wrong", [suspect("a", "b"), suspect("c")], False))
    assert found_by(case, lambda name: name == "b") == [("cause", "wrong", ("b",))]


@pytest.mark.parametrize(
    ("verdict", "count", "harmless", "hopeful"),
    [
        (Verdict(True, "", None), 0, {"a"}, False),
        (Verdict(False, "", None, hopeless=True), 0, set(), False),
        (Verdict(False, "cure()", None, hopeful=True), 1, set(), True),
        (Verdict(False, "", None, " No cure is told."), 1, set(), False),
    ],
)
def test_verdicts(case, monkeypatch, verdict: Verdict, count: int, harmless: set[str], hopeful: bool) -> None:
    monkeypatch.setattr(accusations, "judge", lambda *args: verdict)
    causes(monkeypatch, ("cause", "wrong", [suspect("a")], False))
    vars(one := Accusations(case, lambda name: True))["_order"] = {}
    found = one.findings()
    assert len(found) == count
    assert all((f.cure, f.evidence) == (verdict.cure, f"evidence{verdict.condemned}") for f in found)
    assert (case.harmless, case.hopeful, case.aside) == (harmless, hopeful, frozenset())


def test_a_note_is_not_judged(case, monkeypatch) -> None:
    monkeypatch.setattr(accusations, "judge", lambda *args: pytest.fail("no fault, nothing to be judged"))
    causes(monkeypatch, ("cause", "note", [suspect("a")], False))
    assert found_by(case) == [("cause", "note", ("a",))]
