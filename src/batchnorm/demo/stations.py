"""What the tour met at each station, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchnorm.checks import CheckResult
from batchnorm.demo.training import TrainingRun
from batchnorm.folding.result import FoldResult
from batchnorm.monitor import WatchResult
from batchnorm.nn.freeze import FreezeResult
from batchnorm.placement.place import PlaceResult
from batchnorm.statistics import RecalibrateResult

__all__ = ["Contender", "Frozen", "Inference", "Stations", "Watched"]


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
class Stations:
    """The whole tour. ``report`` is the page it was written to, ``seconds`` how long it all took."""

    dataset: str
    pictures: tuple[int, int]
    steps: int
    seed: int
    best_rate: float
    losses: dict[float, float]
    runs: list[TrainingRun]
    winner: TrainingRun
    recalibrated: RecalibrateResult
    contenders: tuple[Contender, Contender]
    frozen: Frozen
    folded: FoldResult
    inference: Inference
    folded_accuracy: float
    checked: CheckResult
    placed: PlaceResult
    watched: list[Watched]
    seconds: float
    report: Path
