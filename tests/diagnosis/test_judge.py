"""A cure that makes the metric worse is not told, and what harms nobody is no fault."""

from __future__ import annotations

from typing import Any

import pytest
from tests.diagnosis.case_of import case_of, gap, run_of
from tests.diagnosis.metrics import accuracy

import batchnorm
from batchnorm.diagnosis import judge as judging
from batchnorm.diagnosis.case import Case, Remedy, Suspicion
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.diagnosis.judge import Verdict, judge
from batchnorm.diagnosis.passes import Pass
from batchnorm.diagnosis.trial import Gain, Trial


def test_no_cure_is_told_that_makes_the_metric_worse(net, labelled, batches) -> None:
    """One norm is right to be off, another is poisoned."""
    net.bn2.running_mean.add_(2 * net.bn2.running_var.sqrt())
    made = labelled(accuracy)
    net.bn4.running_mean.add_(3 * net.bn4.running_var.sqrt())
    result = batchnorm.diagnose(net, made, accuracy)
    for finding in result.findings:
        assert finding.gain is None or finding.gain.metric_after >= finding.gain.metric_before
        assert finding.cure or "No cure is told" in finding.evidence


class Plain(Cause):
    key = "plain"

    def find(self, case: Case) -> Any:
        raise NotImplementedError


class Certain(Plain):
    judged_by_metric = False


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[str, Pass | None]:
    """What the trial of each cure gives, by its code; None for one that cannot be tried."""
    runs: dict[str, Pass | None] = {}

    def try_remedy(case: Case, remedy: Remedy) -> Trial | None:
        done = runs[remedy.code]
        deployed = case.gaps.deployed.metric
        return None if done is None else Trial(done, Gain(1.0, 0.5, deployed, done.metric, None))

    monkeypatch.setattr(judging, "try_remedy", try_remedy)
    return runs


def judged(case: Case, *codes: str, kind: type[Cause] = Plain, certain: bool = False) -> Verdict:
    first, *others = codes
    return judge(case, kind, Suspicion(["a"], "", first, others=[Remedy(code) for code in others], certain=certain))


BAD, GOOD, BETTER, WORSE = run_of(0.5, 0.5, 0.5), run_of(0.8, 0.8, 0.8), run_of(0.9, 0.9, 0.9), run_of(0.3, 0.3, 0.3)


def test_without_a_metric_the_first_cure_is_told(tried) -> None:
    tried.update(first=WORSE, second=GOOD)
    verdict = judged(case_of(gap("a")), "first", "second")
    assert (verdict.harmless, verdict.cure) == (False, "first")


def test_a_cure_that_makes_the_metric_worse_is_not_told_another_one_is(tried) -> None:
    case = case_of(gap("a"), deployed=BAD, training=GOOD)
    tried.update(first=WORSE, second=GOOD, third=BETTER)
    assert judged(case, "first", "second").cure == "second"
    best = judged(case, "first", "second", "third")
    assert (best.cure, best.trial.done) == ("third", BETTER)
    assert judged(case, "third", "second").cure == "third"
    alone = judged(case, "first")
    assert (alone.cure, alone.trial) == ("", None)
    assert alone.condemned == " No cure is told, for its own trial makes the metric worse: metric 0.5 → 0.3."


def test_a_cure_that_leaves_the_metric_as_it_is_is_told(tried) -> None:
    tried.update(first=BAD)
    verdict = judged(case_of(gap("a"), deployed=BAD, training=GOOD), "first")
    assert (verdict.cure, verdict.condemned) == ("first", "")


def test_a_cure_that_cannot_be_tried_may_be_told(tried) -> None:
    tried.update(first=WORSE, by_hand=None)
    verdict = judged(case_of(gap("a"), deployed=BAD, training=GOOD), "first", "by_hand")
    assert (verdict.cure, verdict.trial, verdict.condemned) == ("by_hand", None, "")


@pytest.mark.parametrize(("kind", "harmless"), [(Plain, True), (Certain, False)])
def test_where_eval_mode_is_as_good_and_no_cure_helps_there_is_no_fault(tried, kind, harmless: bool) -> None:
    tried.update(first=GOOD)
    assert judged(case_of(gap("a"), deployed=GOOD), "first", kind=kind).harmless is harmless


def test_where_a_cure_helps_all_the_same_there_is_one(tried) -> None:
    tried.update(first=BETTER)
    verdict = judged(case_of(gap("a"), deployed=GOOD), "first")
    assert (verdict.harmless, verdict.cure) == (False, "first")


CHANCE = run_of(0.1, 0.1, 0.1, other=0.1)


@pytest.mark.parametrize(
    ("trial", "kind", "certain", "hopeless", "hopeful"),
    [
        (CHANCE, Plain, False, True, False),
        (CHANCE, Plain, True, False, False),
        (CHANCE, Certain, False, False, False),
        (run_of(0.8, 0.8, 0.8, other=0.1), Plain, False, False, True),
        (None, Plain, False, False, True),  # what nobody can try may help
    ],
)
def test_a_model_at_chance_is_hopeless_unless_a_cure_is_better(
    tried, trial: Pass | None, kind, certain: bool, hopeless: bool, hopeful: bool
) -> None:
    case = case_of(gap("a"), deployed=CHANCE)
    vars(case.goal)["at_chance"] = True  # as the outputs of other samples say
    tried.update(first=trial)
    verdict = judged(case, "first", kind=kind, certain=certain)
    assert (verdict.hopeless, verdict.hopeful) == (hopeless, hopeful)
