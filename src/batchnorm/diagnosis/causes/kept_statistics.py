"""Statistics that do not fit and are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["KeptStatistics"]


class KeptStatistics(Cause):
    """Statistics that are not those of what the norms meet, and with which the model was trained: a note, no fault.

    What it finds:
        With a metric: a gap where eval mode is as good as batch statistics and population statistics, or better.
        Without: a gap of norms that the user froze. Both are what fine-tuning with frozen norms leaves: the weights
        have learnt to live with the statistics as they are stored, so that others would harm.

    What excludes it:
        A metric that is better on other statistics. Without one: frozen norms with initial values, or norms behind
        them that fit what they meet once the frozen ones are put right; see ``frozen_wrong``.

    Evidence:
        The largest gap, and the metric.

    Cure:
        None is needed: leave the statistics as they are, and freeze the norms before training goes on. Where nothing
        was trained since the norms were frozen, measure them; a metric tells.
    """

    key = "kept_statistics"
    severity = "note"
    excluded_at_home = False
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one note for all norms whose gap is no fault."""
        goal = case.goal
        lived_with = {layer.name for layer in case.off} & case.lived_with
        judged = goal.known and not goal.at_chance
        kept = case.harmless | lived_with if judged else case.harmless
        harmless = [layer for layer in case.layers if layer.name in kept]
        if harmless:
            better = "better" if goal.eval_is_better else "as good"
            evidence = (
                f"{_gap(case, harmless)}, and eval mode is {better} with them: the metric is "
                f"{goal.deployed.metric:.4g}, on batch statistics {goal.training.metric:.4g}, after a trial "
                f"recalibration {goal.recalibrated.metric:.4g}. Leave them as they are, and freeze the norms before "
                "you train on."
            )
            yield Suspicion(names_of(harmless), evidence, "batchnorm.freeze(model)")
        left = [layer for layer in case.layers if layer.name in lived_with]
        if left and not harmless:
            evidence = (
                f"{_gap(case, left)}, and they are {case.why_frozen(left[0])}: right if the weights were trained "
                'since. If they were not, batchnorm.recalibrate(model, batches, names="*") helps. A metric would tell.'
            )
            yield Suspicion(names_of(left), evidence, "")


def _gap(case: Case, layers: Sequence[LayerGap]) -> str:
    return (
        f"The stored statistics of {len(layers)} of {len(case.layers)} norms are up to "
        f"{max(layer.distance for layer in layers):.2g} standard deviations from what they meet"
    )
