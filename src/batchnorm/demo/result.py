"""What the tour found, station by station."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batchnorm.checks import CheckResult
from batchnorm.demo.training import Run
from batchnorm.folding.result import FoldResult
from batchnorm.monitor import WatchResult
from batchnorm.nn.freeze import FreezeResult
from batchnorm.placement.place import PlaceResult
from batchnorm.report import Document, Result
from batchnorm.report.result import finite_or_none
from batchnorm.statistics import RecalibrateResult

__all__ = ["Contender", "DemoResult", "Frozen", "Inference", "Watched"]


@dataclass(frozen=True)
class Contender:
    """One kind of statistics in eval mode: accuracy and mean cross-entropy on the test pictures."""

    name: str
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Frozen:
    """A freeze, and whether the statistics were bit-identical after ``model.train()`` and a forward."""

    result: FreezeResult
    kept: bool


@dataclass(frozen=True)
class Inference:
    """Median time of a forward over 60 pictures in µs, and the median of the ratio before/after, run by run."""

    before: float
    after: float
    speedup: float


@dataclass(frozen=True)
class Watched:
    """What the watch said of one set of pictures, and how many of them the network still got right."""

    name: str
    accuracy: float
    result: WatchResult


@dataclass(repr=False)
class DemoResult(Result):
    """The whole tour. ``report`` is the page it was written to, ``seconds`` how long it all took."""

    dataset: str
    pictures: tuple[int, int]
    steps: int
    seed: int
    best_rate: float
    losses: dict[float, float]
    runs: list[Run]
    winner: Run
    recalibrated: RecalibrateResult
    contenders: tuple[Contender, Contender]
    frozen: Frozen
    folded: FoldResult
    inference: Inference
    folded_accuracy: float
    checked: CheckResult
    placed: PlaceResult
    watched: list[Watched]
    seconds: float = 0.0
    report: Path | None = None

    def document(self) -> Document:
        """Return the report as data."""
        from batchnorm.demo.story import tell

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
            "report": str(self.report) if self.report else None,
        }
