"""A tour that is over at once: every station on two small networks that nobody trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.checks import check
from batchnorm.demo.result import DemoResult
from batchnorm.demo.stations import Contender, Frozen, Inference, Watched
from batchnorm.demo.training import Probe, TrainingRun
from batchnorm.folding.fold import fold
from batchnorm.monitor import watch
from batchnorm.nn.freeze import freeze, unfreeze
from batchnorm.placement.place import place
from batchnorm.statistics import recalibrate


def _run(norm: bool, rate: float, loss: float, *accuracies: float) -> TrainingRun:
    probes = [Probe(10 * 3**i, accuracy, (-1.0, 0.0, 1.0), 0.25) for i, accuracy in enumerate(accuracies)]
    return TrainingRun(norm, rate, nn.Sequential(), loss, probes)


@pytest.fixture(scope="session")
def _stations() -> DemoResult:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Linear(6, 3))
    plain = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))
    x = torch.randn(120, 4)
    recalibrated = recalibrate(network, x.split(40), progress=False)
    frozen = freeze(network)
    unfreeze(network)
    network.eval()
    watched = []
    for name, pictures in (("as in training", x), ("inverted", 4 - x)):
        with torch.no_grad(), watch(network) as w:
            network(pictures)
        watched.append(Watched(name, 0.5, w.result()))
    return DemoResult(
        dataset="digits",
        pictures=(1347, 450),
        steps=90,
        seed=3,
        best_rate=0.5,
        losses={0.5: 0.25, 2.5: float("nan")},
        runs=[
            _run(False, 0.5, 0.25, 0.5, 0.8, 0.8),
            _run(True, 0.5, 0.125, 0.7, 0.9, 0.95),
            _run(False, 2.5, float("nan"), 0.1, 0.1, 0.1),
            _run(True, 2.5, 0.1, 0.85, 0.9, 0.9),
        ],
        winner=_run(True, 2.5, 0.1, 0.85, 0.9, 0.9),
        recalibrated=recalibrated,
        contenders=(Contender("moving average", 0.9, 0.4), Contender("population", 0.925, 0.3)),
        frozen=Frozen(frozen, True),
        folded=fold(network, x[:8]),
        inference=Inference(50.0, 40.0, 1.25),
        folded_accuracy=0.925,
        checked=check(network, x[:8]),
        placed=place(plain, x[:8]),
        watched=watched,
        seconds=12.0,
        report=Path("tour") / "report.html",
    )


@pytest.fixture
def stations(_stations: DemoResult) -> DemoResult:
    """What the tour met, to be changed at will."""
    return copy.copy(_stations)
