"""A training run and what is seen along the way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from batchnorm.demo import training
from batchnorm.demo.datasets import Dataset
from batchnorm.demo.training import TrainingRun, accuracy, favourite_learning_rate, train


def data() -> Dataset:
    """Pictures of four pixels, of which the brighter half says the class."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(80, 2, 2, generator=generator), torch.arange(80) % 2
    images[labels == 1, 0] += 1
    return Dataset("toy", images[:60], labels[:60], images[60:], labels[60:])


def test_a_run_is_named_by_norm_and_rate() -> None:
    assert TrainingRun(True, 0.5, nn.Sequential()).name == "with norm, lr 0.5"
    assert TrainingRun(False, 30.0, nn.Sequential()).name == "plain, lr 30"


@pytest.mark.parametrize(
    ("steps", "probes", "looks"),
    [
        (1, 1, [1]),
        (10, 1, [10]),
        (20, 4, [10, 14, 20]),  # half evenly: 10, 20; half by the logarithm, from 10: 10, 14
        (40, 4, [10, 20, 40]),
    ],
)
def test_looks_are_spread_evenly_and_by_the_logarithm(steps: int, probes: int, looks: list[int]) -> None:
    advanced: list[int] = []
    options = {"norm": True, "learning_rate": 0.1, "steps": steps, "seed": 0, "probes": probes}
    run = train(data(), **options, advance=lambda: advanced.append(1))
    assert [probe.step for probe in run.probes] == looks
    assert len(advanced) == steps
    assert run.network.training


def test_a_seed_fixes_weights_and_order_and_norms_change_neither() -> None:
    runs = [train(data(), norm=norm, learning_rate=0.0, steps=3, seed=4, probes=1) for norm in (False, True, True)]
    assert runs[1].loss == runs[2].loss
    plain, normed = (
        [layer.weight for layer in run.network.modules() if isinstance(layer, nn.Linear)] for run in runs[:2]
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, normed, strict=True))


def test_a_probe_sees_accuracy_percentiles_and_saturation_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(data(), norm=False, learning_rate=0.0, steps=1, seed=0, probes=1)
    (probe,) = run.probes
    run.network.eval()
    assert probe.accuracy == accuracy(run.network, data().test_images, data().test_labels)
    assert list(probe.percentiles) == sorted(probe.percentiles)
    assert probe.saturated == 0.0
    inputs = [torch.tensor([[-9.0, 0.0], [9.0, 0.0]]), torch.tensor([[0.0], [9.0]])]
    monkeypatch.setattr(training, "hidden_inputs", lambda network, images: inputs)
    (probe,) = train(data(), norm=False, learning_rate=0.0, steps=1, seed=0, probes=1).probes
    assert probe.saturated == 3 / 6
    assert probe.percentiles == pytest.approx((1.35, 4.5, 7.65))  # of 0 and 9


def test_the_favourite_rate_is_the_one_that_learns_soonest() -> None:
    best, losses = favourite_learning_rate(data(), (1e-6, 1.0), steps=30, seed=0)
    assert best == 1.0
    assert losses[1.0] < losses[1e-6]


def test_a_rate_at_which_training_breaks_is_no_favourite(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {0.1: 0.7, 1.0: math.nan, 10.0: 0.9}

    def trained(data: Dataset, *, learning_rate: float, **options: object) -> TrainingRun:
        return TrainingRun(False, learning_rate, nn.Sequential(), told[learning_rate])

    monkeypatch.setattr(training, "train", trained)
    assert favourite_learning_rate(data(), (0.1, 1.0, 10.0), steps=1, seed=0)[0] == 0.1


def test_accuracy_is_the_share_that_is_right() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert accuracy(nn.Identity(), images, torch.tensor([0, 1, 1, 0])) == 0.75
