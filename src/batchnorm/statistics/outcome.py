"""What measuring a stream gave, whatever the order."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite

from batchnorm.statistics.sites import Site
from batchnorm.statistics.tally import Tally

__all__ = ["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What measuring gave.

    Attributes:
        tallies: what each norm met, in all processes.
        batches: how many batches were used, in all processes.
        notes: what the user should know.
    """

    tallies: dict[Site, Tally]
    batches: int
    notes: tuple[str, ...] = ()

    @property
    def uncertainty(self) -> float:
        """That of the least certain norm."""
        return max((tally.overall_uncertainty() for tally in self.tallies.values()), default=0.0)

    def needed(self, tolerance: float) -> int | None:
        """Return how many batches it takes for that tolerance, by the law of 1/√n; None if nothing is known."""
        if not isfinite(self.uncertainty):
            return None
        return max(1, ceil(self.batches * (self.uncertainty / tolerance) ** 2))
