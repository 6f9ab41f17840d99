"""Whether a suspicion is a fault by the user's own measure, and which cure its trial does not condemn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.diagnosis.case import Case, Remedy, Suspicion
from batchnorm.diagnosis.causes.cause import Cause
from batchnorm.diagnosis.trial import Trial, try_remedy

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """What is to be told of a suspicion.

    Attributes:
        harmless: by the metric it is no fault.
        cure: the line of code; ``""`` where every trial made the metric worse.
        trial: what the cure brought; None where it cannot be tried.
        condemned: what the trials of other cures brought, as the end of the evidence.
        hopeless: the model is at chance by the metric, and no cure tried makes it better than that.
        hopeful: it is at chance, and there is a cure that does, or that only the user can try.
    """

    harmless: bool
    cure: str
    trial: Trial | None
    condemned: str = ""
    hopeless: bool = False
    hopeful: bool = False


def judge(case: Case, kind: type[Cause], suspicion: Suspicion) -> Verdict:
    """Try the cures of a suspicion, and return what is to be told of it.

    Without a metric, or where nobody knows whether more of it is better, the first cure is told. With one, a cure whose
    trial makes it worse is not; and where eval mode is as good as batch statistics, and no cure makes it better, there
    is no fault.
    """
    goal = case.goal
    if not goal.known and not goal.at_chance:
        first = suspicion.remedies[0]
        return Verdict(False, first.code, try_remedy(case, first))
    tried = [(remedy, try_remedy(case, remedy)) for remedy in suspicion.remedies]
    runs = [trial.done for _, trial in tried if trial is not None]
    hopeful = goal.at_chance and (not all(map(goal.by_chance, runs)) if runs else kind.judged_by_metric)
    if kind.judged_by_metric and goal.at_chance and not hopeful and not suspicion.certain:
        return Verdict(False, "", None, hopeless=True)
    helping = [done for done in runs if goal.improves(case.gaps.deployed, done)]
    as_good = goal.eval_is_as_good and not goal.at_chance
    if kind.judged_by_metric and as_good and runs and not helping:
        return Verdict(True, "", None)
    offered = [(remedy, trial) for remedy, trial in tried if trial is None or _worth_telling(case, trial)]
    if offered:
        return Verdict(False, *_best(case, offered), hopeful=hopeful)
    worse = "; ".join(str(trial.gain) for _, trial in tried if trial is not None)
    condemned = f" No cure is told, for its own trial makes the metric worse: {worse}."
    return Verdict(False, "", None, condemned, hopeful=hopeful)


def _worth_telling(case: Case, trial: Trial) -> bool:
    return case.goal.gain(case.gaps.deployed, trial.done) >= 0


def _best(case: Case, offered: Sequence[tuple[Remedy, Trial | None]]) -> tuple[str, Trial | None]:
    """Return the first cure, unless another is better by more than chance."""
    best, trial = offered[0]
    for remedy, other in offered[1:]:
        if trial is not None and other is not None and case.goal.improves(trial.done, other.done):
            best, trial = remedy, other
    return best.code, trial
