"""Residual branches that begin at zero."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnosis.case import Case, Suspicion
from batchnorm.diagnosis.causes.cause import Cause, listing, names_of
from batchnorm.diagnosis.causes.initial import is_zero

__all__ = ["ZeroInit"]


class ZeroInit(Cause):
    """Norms whose γ is zero on purpose: a note, no fault.

    What it finds:
        γ = 0 and β = 0 exactly, in every channel of a norm. Residual networks begin like this (``zero_init_residual``,
        ``zero_init_last``): the last norm of each branch gives nothing, so that a block is the identity at first.

    What excludes it:
        A γ or β that is not zero: these channels were trained, or pruned; see ``dead_channels``.

    Evidence:
        The norms.

    Cure:
        None is needed; the first step of training moves them.
    """

    key = "zero_init"
    severity = "note"
    excluded_at_home = False
    excluded_by_freeze = False

    def find(self, case: Case) -> Iterator[Suspicion]:
        """Yield one note for all such norms."""
        found = [layer for layer in case.layers if is_zero(layer)]
        if not found:
            return
        evidence = (
            f"γ and β of {len(found)} of {len(case.layers)} norms ({listing(names_of(found))}) are exactly 0, as the "
            "last norms of residual branches begin: these branches give nothing before they are trained."
        )
        yield Suspicion(names_of(found), evidence, "")
