"""What the tour found, station by station."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from batchnorm.demo.stations import Stations
from batchnorm.demo.story import tell
from batchnorm.report import Document, Result
from batchnorm.report.result import finite_or_none

__all__ = ["DemoResult"]


@dataclass(repr=False)
class DemoResult(Stations, Result):
    """The whole tour, as a report."""

    def document(self) -> Document:
        """Return the report as data."""
        return tell(self)

    def to_dict(self) -> dict[str, Any]:
        """Return every figure of the tour."""
        return {
            "dataset": self.dataset,
            "pictures": {"train": self.pictures[0], "test": self.pictures[1]},
            "steps": self.steps,
            "seed": self.seed,
            "favourite_learning_rate": self.best_rate,
            "training_loss_by_learning_rate": {f"{rate:g}": finite_or_none(loss) for rate, loss in self.losses.items()},
            "runs": [
                {
                    "norm": run.norm,
                    "learning_rate": run.learning_rate,
                    "training_loss": finite_or_none(run.loss),
                    "probes": [asdict(probe) for probe in run.probes],
                }
                for run in self.runs
            ],
            "recalibrate": self.recalibrated.to_dict(),
            "statistics": [asdict(contender) for contender in self.contenders],
            "freeze": {**self.frozen.result.to_dict(), "statistics_kept_after_train": self.frozen.kept},
            "fold": {**self.folded.to_dict(), "accuracy": self.folded_accuracy},
            "inference": asdict(self.inference),
            "check": self.checked.to_dict(),
            "place": self.placed.to_dict(),
            "watch": [{"pictures": row.name, "accuracy": row.accuracy, **row.result.to_dict()} for row in self.watched],
            "seconds": self.seconds,
            "report": str(self.report),
        }
