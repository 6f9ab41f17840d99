"""Data that are not those of the training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from batchnorm.diagnosis.case import Case, Remedy, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.gaps import TOLERANCE, LayerGap
from batchnorm.diagnosis.kept_batches import first_tensor, float_inputs, with_input
from batchnorm.diagnosis.norm_record import Basis
from batchnorm.diagnosis.preparations import affine, line_of
from batchnorm.diagnosis.stem import InputChange, explain

__all__ = ["DomainShift"]

_EXPLAINED = 0.4
"""A change of the input has to leave less than this share of the distance."""


class DomainShift(Cause):
    """The stored statistics are those of other data.

    What it finds:
        With ``training_batches``: norms whose statistics fit those batches and do not fit ``batches``. Without: a gap
        that begins at the first norm, and that a change of the input accounts for: another contrast, another
        brightness in each input channel, white noise. That is a fit of few unknowns to the means and variances of all
        its channels, by what the layers before the norm answer to zeros, ones and noise.

    What excludes it:
        Training batches that the statistics do not fit. Without training batches: norms that the user froze.

    Evidence:
        The gap on either data; or the change of the input, and how much of the gap it explains.

    Cure:
        Prepare the data as for the training, or measure the statistics on the new data; with a metric, what a trial
        shows to be better. A known fault of the preparation is told by ``input_preparation``.
    """

    key = "domain_shift"
    excluded_at_home = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion, at the first layer with a gap."""
        left = case.off
        if not left:
            return
        change = _input_change(case, left[0])
        evidence = _beside_home(case, left) if case.at_home is not None else _by_input(case, left[0], change)
        if not evidence:
            return
        case.explained.update(names_of(left))
        yield Suspicion(
            names_of(left), evidence, case.recalibrate(left), case.corrected(left),
            others=_undone(case, change), certain=case.at_home is not None,
        )  # fmt: skip


def _beside_home(case: Case, left: list[LayerGap]) -> str:
    assert case.at_home is not None
    home = {layer.name: layer for layer in case.at_home.layers}
    fitting = [layer for layer in left if case.fits_home(layer)]
    if left[0] not in fitting or 2 * len(fitting) < len(left):
        return ""
    first = left[0]
    return (
        f"The stored statistics are {home[first.name].distance:.2g} standard deviations from what the norm meets on "
        f"the training batches, and {first.distance:.2g} from what it meets on these ({len(fitting)} norms likewise)."
    )


def _by_input(case: Case, first: LayerGap, change: InputChange | None) -> str:
    if change is None or case.n_averaged is not None:
        return ""
    # once it is normalized, another contrast is gone: it leaves the norms behind the first one as they are
    if change.noise == 0 and len(case.layers) > 2 and len(case.off) == len(case.layers):
        return ""
    return f"{_words(change)}: that explains {100 * (1 - change.left):.0f} % of the gap of the first norm."


def _input_change(case: Case, first: LayerGap) -> InputChange | None:
    """Return the change of the input that accounts for the gap of the first norm, if one does."""
    change = explain(case.passes, first) if first is case.layers[0] else None
    if change is None or change.left > _EXPLAINED or change.left * first.distance > 1.5 * TOLERANCE:
        return None
    return change


def _undone(case: Case, change: InputChange | None) -> list[Remedy]:
    """Return the cure that changes the inputs back, where that can be done."""
    batches = case.passes.batches
    if change is None or change.noise > 0 or not all(map(float_inputs, batches)):
        return []
    due = affine(change.contrast, change.brightness, _dims(batches[0]))
    line = line_of(batches[0], due.code)
    return [] if line is None else [Remedy(line, Basis("stored"), partial(with_input, change=due))]


def _words(change: InputChange) -> str:
    """Return the change of the input in words."""
    shifts = ", ".join(f"{b:+.3g}" for b in change.brightness).replace("-", "−")
    noise = f", without white noise of standard deviation {change.noise:.2g}" if change.noise > 0 else ""
    return f"It is as if it had been trained on {change.contrast:.3g} × these inputs, shifted by {shifts}{noise}"


def _dims(batch: Any) -> int:
    first = first_tensor(batch)
    return 0 if first is None else first.dim()
