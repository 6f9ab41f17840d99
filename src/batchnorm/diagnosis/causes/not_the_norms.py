"""A model that is as bad on batch statistics."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause

__all__ = ["NotTheNorms"]


class NotTheNorms(Cause):
    """The model is bad whatever its norms normalize by: they are not the cause.

    What it finds:
        A metric that is no better, in eval mode, on batch statistics, and on population statistics, than it is when
        each sample is given the output for another one. No statistics can mend that: weights that were not loaded, or
        loaded in another order; labels that are not those of the samples; inputs that are not what the model takes.

    What excludes it:
        A cure whose trial makes the metric better than that. A metric that looks at the outputs alone tells nothing.

    Evidence:
        The metric on the three kinds of statistics, and with the outputs of other samples.

    Cure:
        Compare the weights with those that were saved, run the model on samples of the training whose outputs are
        known, and look at what the metric is given.
    """

    key = "not_the_norms"
    excluded_at_home = False
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion, at the model itself."""
        goal = case.goal
        if not goal.at_chance or case.hopeful:
            return
        values = [
            f"{done.metric:.4g} {where}"
            for done, where in (
                (goal.deployed, "in eval mode"),
                (goal.training, "on batch statistics"),
                (goal.recalibrated, "after a trial recalibration"),
            )
        ]
        evidence = (
            f"The model is as bad on batch statistics: the metric is {', '.join(values)}, and {goal.chance:.4g} if "
            "each sample is given the output for another one. The norms are not the cause: compare weights, inputs and "
            "labels with those of the training."
        )
        yield Suspicion([""], evidence, "")
