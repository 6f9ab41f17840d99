"""Inputs prepared otherwise than those of the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch

from batchnorm.diagnosis.case import Case, Remedy, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.distance import layer_distance
from batchnorm.diagnosis.gaps import TOLERANCE, LayerGap
from batchnorm.diagnosis.kept_batches import first_tensor, float_inputs, with_input
from batchnorm.diagnosis.norm_record import Basis
from batchnorm.diagnosis.preparations import Preparation, Range, fitted, known, line_of
from batchnorm.diagnosis.stem import explain, first_inputs
from batchnorm.moments import Moments

__all__ = ["InputPreparation"]

_LEFT = 0.25
"""What a preparation leaves of the distance of the first norm, at most, chance taken off."""

_WITH_CHANCE = 0.5
"""The same with what chance leaves: of a small gap that is much."""

_LEFT_OVER = 1.5 * TOLERANCE
_SOME = 16


class InputPreparation(Cause):
    """The input is not prepared as it was for the training: a missing /255, mean and std left out, swapped, or twice.

    What it finds:
        A gap that begins at the first norm and collapses once the inputs are prepared in another way: divided by 255;
        normalized by a common mean and std, or by those that a fit of contrast and brightness gives; normalized once
        less; mean and std exchanged; channels in the opposite order. The layers before the first norm are run on
        inputs prepared so, and what it then meets is compared with what it has stored. The range of the inputs has to
        allow it: only pixels in [0, 1] lack a normalization, and only values far beyond one lack the /255.

    What excludes it:
        Training batches that the stored statistics do not fit: then the fault is in the model. A first norm that fits.

    Evidence:
        What the inputs look like, their range, and how much of the gap the other preparation explains. What these
        batches leave by chance speaks against none.

    Cure:
        Prepare the inputs as for the training, the line of code does so for ``batches``. Measuring statistics on wrong
        inputs hides the fault, and leaves a model that needs wrong inputs.
    """

    key = "input_preparation"
    excluded_at_home = False
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion, at the first norm."""
        left = case.off
        if not left or left[0] is not case.layers[0] or not all(map(float_inputs, case.passes.batches)):
            return
        first = left[0]
        # once it is normalized, another scale is gone: it leaves some of the norms behind the first one as they are
        if len(case.layers) > 2 and len(left) == len(case.layers):
            return
        if case.home is not None and not case.fits_home(first):
            return
        found = _best(case, first)
        if found is None:
            return
        due, share, given = found
        evidence = (
            f"The input {due.words}. It goes from {given.least:.3g} to {given.largest:.3g}, mean {given.mean:.3g}; "
            f"with {due.code} instead, {100 * (1 - share):.0f} % of the gap of the first norm is gone."
        )
        line = line_of(case.passes.batches[0], due.code) or f"# give the model {due.code} for its input x"
        case.explained.update(names_of(left))
        change = partial(with_input, change=due)
        yield Suspicion(
            names_of(left), evidence, line, Basis("stored"), change=change,
            others=[Remedy(case.recalibrate(left), case.corrected(left))],
        )  # fmt: skip


def _best(case: Case, first: LayerGap) -> tuple[Preparation, float, Range] | None:
    """Return the preparation that leaves least of the gap, what share it leaves, and the range of the inputs."""
    batches = case.passes.batches[:_SOME]
    inputs = [x for batch in batches if (x := first_tensor(batch)) is not None]
    given, dims = Range.of(inputs), inputs[0].dim()
    candidates = list(known(given, inputs[0].shape[1], dims))
    for contrast in (None, 1 / 255):
        change = explain(case.passes, first, noisy=False, contrast=contrast)
        due = None if change is None else fitted(given, change.contrast, change.brightness, dims)
        candidates += [] if due is None else [due]
    shares = [(*_shares(case, first, batches, due), due) for due in candidates]
    if not shares:
        return None
    share, beyond, best = min(shares, key=lambda one: round(20 * one[0]))  # among equals the first
    if share > _WITH_CHANCE or beyond > _LEFT or share * first.distance > _LEFT_OVER:
        return None
    return best, share, given


def _shares(case: Case, first: LayerGap, batches: Sequence[Any], due: Preparation) -> tuple[float, float]:
    """Return what share of the distance of the first norm is left if the inputs are prepared so, and beyond chance."""
    met = first_inputs(case.passes, [with_input(batch, due) for batch in batches], first)
    if not met:
        return 1.0, 1.0
    moments = reduce(Moments.merge, (Moments.of(x.cpu()) for x in met))
    mean, variance = moments.mean, moments.variance(correction=1)
    if not bool(torch.isfinite(variance).all()):
        return 1.0, 1.0
    whole = max(first.distance, 1e-300)
    left = layer_distance(first.stored, (mean, variance), first.eps)
    return left / whole, first.excess_from((mean, variance)) / whole
