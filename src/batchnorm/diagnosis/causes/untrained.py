"""A model as it was constructed."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.causes.initial import is_constructed, is_initial

__all__ = ["Untrained"]


class Untrained(Cause):
    """A model that was never trained, or into which nothing was loaded: a note, no fault of its norms.

    What it finds:
        Every norm as it is constructed: γ is 1 throughout (or 0, as residual networks begin), β is 0, the stored mean 0
        and variance 1, no batch counted. Weights, γ, β and statistics were not loaded, or there are none to load yet;
        or norms were put into a trained model and have not been measured.

    What excludes it:
        One norm that has learnt γ or β or counted a batch; norms without γ and β, which show nothing; a metric that is
        better on batch statistics than by chance.

    Evidence:
        The count of norms.

    Cure:
        Load the weights and the statistics, or train. Norms that were put into a trained model are to be measured.
    """

    key = "untrained"
    severity = "note"
    excluded_at_home = False
    excluded_by_freeze = False
    alone = True

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one note for the whole model."""
        if not case.layers or not all(
            is_initial(layer) and is_constructed(layer) and not layer.num_batches_tracked for layer in case.layers
        ):
            return
        if case.goal.known and not case.goal.by_chance(case.gaps.training):
            return
        evidence = (
            f"The model is as constructed: γ, β, running mean and variance of all {len(case.layers)} norms have their "
            "initial values, and no batch was counted. Load its weights and buffers, or train it. If its other weights "
            "are trained, and the norms were added since, measure their statistics."
        )
        yield Suspicion(names_of(case.layers), evidence, "batchnorm.recalibrate(model, batches)  # if it is trained")
