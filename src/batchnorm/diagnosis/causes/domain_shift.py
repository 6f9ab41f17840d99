"""Data that are not those of the training."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, names_of
from batchnorm.diagnosis.gaps import TOLERANCE, LayerGap
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

    Evidence:
        The gap on either data; or the change of the input, and how much of the gap it explains.

    Cure:
        Prepare the data as for the training, the same scaling above all; or measure the statistics on the new data.
    """

    key = "domain_shift"

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion, at the first layer with a gap."""
        left = case.off
        if not left:
            return
        evidence = _beside_home(case, left) if case.at_home is not None else _by_input(case, left[0])
        if not evidence:
            return
        case.explained.update(names_of(left))
        yield Suspicion(names_of(left), evidence, case.recalibrate(left), case.corrected(left))


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


def _by_input(case: Case, first: LayerGap) -> str:
    if first is not case.layers[0] or case.n_averaged is not None:
        return ""
    change = explain(case.passes, first)
    if change is None or change.left > _EXPLAINED or change.left * first.distance > 1.5 * TOLERANCE:
        return ""
    # once it is normalized, another contrast is gone: it leaves the norms behind the first one as they are
    if change.noise == 0 and len(case.layers) > 2 and len(case.off) == len(case.layers):
        return ""
    return f"{_words(change)}: that explains {100 * (1 - change.left):.0f} % of the gap of the first norm."


def _words(change: InputChange) -> str:
    """Return the change of the input in words."""
    shifts = ", ".join(f"{b:+.3g}" for b in change.brightness).replace("-", "−")
    noise = f", without white noise of standard deviation {change.noise:.2g}" if change.noise > 0 else ""
    return f"It is as if it had been trained on {change.contrast:.3g} × these inputs, shifted by {shifts}{noise}"
