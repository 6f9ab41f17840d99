"""One model through its whole life: train, measure, freeze, fold, verify, watch, report."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from batchnorm.checks import check
from batchnorm.dataflow.threads import one_thread
from batchnorm.demo.corruptions import CORRUPTIONS
from batchnorm.demo.datasets import Dataset, load_digits, load_mnist
from batchnorm.demo.result import DemoResult
from batchnorm.demo.stations import Contender, Frozen, Inference, Watched
from batchnorm.demo.training import BATCH, TrainingRun, accuracy, favourite_learning_rate, train
from batchnorm.errors import InputError
from batchnorm.folding.fold import fold
from batchnorm.folding.result import FoldResult
from batchnorm.monitor import watch
from batchnorm.nn.freeze import freeze, unfreeze
from batchnorm.placement.place import PlaceResult, place
from batchnorm.report.progress import progress_bar
from batchnorm.statistics import recalibrate

__all__ = ["run_demo"]

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
LARGER = 5  # the paper's BN-x5
STEPS = {"digits": 3000, "mnist": 50_000}  # 50,000 is what the paper trained on MNIST


def run_demo(
    output: str | Path = "batchnorm-report",
    *,
    dataset: str = "digits",
    root: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> DemoResult:
    """Take the paper's first network through its whole life, on real pictures, and write the report.

    Three hidden layers of 100 sigmoid units are trained with and without norm, from the same weights on the same
    batches, at the learning rate that the plain network likes best and at five times that rate. The fastest network
    with norms is then recalibrated, frozen, folded, timed, checked, and set to watch pictures that it was not trained
    for.

    Args:
        output: folder in which ``report.html`` is written.
        dataset: ``"digits"`` (shipped with scikit-learn) or ``"mnist"``.
        root: folder of the four MNIST files; not needed for the digits.
        steps: batches of 60 to train on; 3,000 on the digits and the paper's 50,000 on MNIST unless given.
        seed: of weights, batches and the cut of the digits into train and test.
        progress: whether to show progress bars; None shows them on a terminal.

    Raises:
        InputError: unknown data set, missing or damaged MNIST files, or fewer than one step.
        StateError: an optional package is missing.

    Source: Ioffe & Szegedy 2015, §4.1 (arXiv 1502.03167).
    """
    started = time.perf_counter()
    data = _load(dataset, root, seed)
    steps = STEPS[dataset] if steps is None else steps
    if steps < 1:
        raise InputError(f"steps={steps}: expected at least 1 step of training.")
    with one_thread():  # layers of 100 units are too small to share out
        best, losses, runs = _race(data, steps, seed, progress)
        winner = min((run for run in runs if run.norm), key=lambda run: run.loss)
        network = winner.network
        average = _contender("moving average", network, data)
        recalibrated = recalibrate(network, data.train_images.split(BATCH), progress=progress)
        population = _contender("population", network, data)
        frozen = _freeze(network, data)
        network.eval()
        example = data.test_images[:BATCH]
        folded = fold(network, example)
        plain = next(run for run in runs if not run.norm)
        result = DemoResult(
            dataset=dataset,
            pictures=(len(data.train_images), len(data.test_images)),
            steps=steps,
            seed=seed,
            best_rate=best,
            losses=losses,
            runs=runs,
            winner=winner,
            recalibrated=recalibrated,
            contenders=(average, population),
            frozen=frozen,
            folded=folded,
            inference=_time(network, folded, example),
            folded_accuracy=accuracy(folded.model, data.test_images, data.test_labels),
            checked=check(network, example),
            placed=_place(plain, example),
            watched=_watch(network, data),
            report=Path(output) / "report.html",
            seconds=time.perf_counter() - started,
        )
    result.to_html(result.report)
    return result


def _load(dataset: str, root: str | Path | None, seed: int) -> Dataset:
    if dataset == "digits":
        return load_digits(seed)
    if dataset == "mnist":
        return load_mnist(root)
    raise InputError(f"dataset {dataset!r}: expected 'digits' or 'mnist'.")


def _race(
    data: Dataset, steps: int, seed: int, progress: bool | None
) -> tuple[float, dict[float, float], list[TrainingRun]]:
    """Find the plain network's favourite rate, then train with and without norm at it and at the larger one."""
    trial = min(steps, STEPS["digits"])
    with progress_bar("Training", len(RATES) * trial + 4 * steps, progress) as advance:
        best, losses = favourite_learning_rate(data, RATES, steps=trial, seed=seed, advance=advance)
        runs = [
            train(data, norm=norm, learning_rate=rate, steps=steps, seed=seed, advance=advance)
            for rate in (best, LARGER * best)
            for norm in (False, True)
        ]
    return best, losses, runs


@torch.no_grad()
def _contender(name: str, network: nn.Module, data: Dataset) -> Contender:
    network.eval()
    loss = float(F.cross_entropy(network(data.test_images), data.test_labels))
    right = accuracy(network, data.test_images, data.test_labels)
    network.train()
    return Contender(name, right, loss)


def _freeze(network: nn.Module, data: Dataset) -> Frozen:
    """Freeze, call ``train()``, run a forward as a fine-tuning step would, and see what has changed."""
    before = [buffer.clone() for buffer in network.buffers()]
    frozen = freeze(network)
    network.train()
    with torch.no_grad():
        network(1 - data.train_images[:BATCH])  # a batch that would pull the averages far away
    kept = all(torch.equal(a, b) for a, b in zip(before, network.buffers(), strict=True))
    unfreeze(network)
    return Frozen(frozen, kept)


def _time(network: nn.Module, folded: FoldResult, example: Tensor) -> Inference:
    """Time both models in turn, so that a change of the machine's speed meets both."""
    timers = [Timer("model(x)", globals={"model": model, "x": example}) for model in (network, folded.model)]
    with torch.inference_mode():
        for timer in timers:
            timer.timeit(20)
        rounds = [[timer.timeit(50).mean for timer in timers] for _ in range(15)]
    before, after = (statistics.median(column) * 1e6 for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    return Inference(before, after, ratio)


def _place(plain: TrainingRun, example: Tensor) -> PlaceResult:
    """Ask where norms belong in the network that has none."""
    return place(copy.deepcopy(plain.network).train(), example)


def _watch(network: nn.Module, data: Dataset) -> list[Watched]:
    """Show the network the test pictures, then the same ones corrupted."""
    rows = []
    for name, corrupt in {"test pictures": lambda images: images, **CORRUPTIONS}.items():
        images = corrupt(data.test_images)
        with torch.no_grad(), watch(network) as watching:
            for batch in images.split(BATCH):
                network(batch)
        rows.append(Watched(name, accuracy(network, images, data.test_labels), watching.result()))
    return rows
