"""Statistics that no data can have."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, listing, names_of
from batchnorm.diagnosis.gaps import LayerGap

__all__ = ["Poisoned"]

_OVERFLOWN = 1e12
"""A stored variance so many times the measured one comes from a value that overflowed, not from data."""


class Poisoned(Cause):
    """Stored statistics that are NaN, infinite, negative, zero, or beyond everything the data could give.

    What it finds:
        A NaN or infinity in ``running_mean`` or ``running_var``; a variance below zero, as a computation of
        E[x²] − E[x]² in float32 leaves it; a variance of zero in a channel that does vary; a variance over 10¹² times
        the measured one. A single overflowing batch under mixed precision is enough: a moving average never forgets an
        infinity.

    What excludes it:
        Nothing: no data have such statistics.

    Evidence:
        The channels and their values.

    Cure:
        Measure the statistics anew.
    """

    key = "poisoned"
    severity = "fatal"
    excluded_at_home = False
    excluded_by_freeze = False
    judged_by_metric = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one suspicion for all poisoned layers."""
        bad = {layer: channels for layer in case.layers if bool((channels := _poisoned(layer)).any())}
        if not bad:
            return
        case.explained.update(names_of(bad))
        layer, channels = next(iter(bad.items()))
        where = channels.nonzero().flatten().tolist()
        mean, variance = (stored[channels][:3].tolist() for stored in layer.stored)
        more = f"; {len(bad) - 1} more layers likewise" if len(bad) > 1 else ""
        evidence = (
            f"{len(where)} of {channels.numel()} channels ({listing(where)}) store mean "
            f"{listing([f'{v:.3g}' for v in mean])} and variance {listing([f'{v:.3g}' for v in variance])}{more}."
        )
        yield Suspicion(names_of(bad), evidence, case.recalibrate(list(bad)), case.corrected(list(bad)))


def _poisoned(layer: LayerGap) -> Tensor:
    mean, variance = layer.stored
    measured = layer.measured[1]
    varies = measured > 1e-6 * measured.median()
    beyond = variance > _OVERFLOWN * (measured + layer.eps)
    return ~torch.isfinite(mean) | ~torch.isfinite(variance) | (variance < 0) | ((variance == 0) & varies) | beyond
