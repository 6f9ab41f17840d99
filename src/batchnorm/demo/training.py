"""Training runs with what is watched along the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.demo.datasets import Dataset
from batchnorm.demo.network import hidden_inputs, sigmoid_network
from batchnorm.monitor.saturation import activation_of

__all__ = ["Probe", "TrainingRun", "favourite_learning_rate", "train"]

BATCH = 60
PERCENTILES = (15, 50, 85)


@dataclass(frozen=True)
class Probe:
    """What one look at a network in training saw, in eval mode on the test pictures.

    Attributes:
        step: number of steps taken.
        accuracy: share of test pictures classified right.
        percentiles: the 15th, 50th and 85th percentile of the input of one unit of the last hidden layer.
        saturated: share of the units of all hidden layers that are saturated, over all test pictures.
    """

    step: int
    accuracy: float
    percentiles: tuple[float, ...]
    saturated: float


@dataclass
class TrainingRun:
    """One training run.

    Attributes:
        norm: whether the network has norms.
        learning_rate: of plain stochastic gradient descent.
        network: the network, trained.
        loss: mean training loss over all steps; lower means learned sooner.
        probes: what was seen along the way, first step first.
    """

    norm: bool
    learning_rate: float
    network: nn.Sequential
    loss: float = float("nan")
    probes: list[Probe] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How the run is called in tables and plots."""
        return f"{'with norm' if self.norm else 'plain'}, lr {self.learning_rate:g}"


def train(
    data: Dataset,
    *,
    norm: bool,
    learning_rate: float,
    steps: int,
    seed: int,
    probes: int = 60,
    advance: Callable[[], None] = lambda: None,
) -> TrainingRun:
    """Train one network for ``steps`` batches of 60 and look at it at most ``probes`` times.

    Half of the looks are spread evenly, half by the logarithm of the step: most of what there is to see comes early.

    For one seed, initial weights and order of the pictures are the same in every run.
    """
    network = sigmoid_network(data.pixels, norm=norm, seed=seed)
    run = TrainingRun(norm, learning_rate, network)
    optimizer = torch.optim.SGD(network.parameters(), learning_rate)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    shares = [(i + 1) / (probes - probes // 2) for i in range(probes - probes // 2)]
    early = [(10 / steps) ** (1 - i / (probes // 2)) for i in range(probes // 2)]
    looks = {min(steps, max(1, round(steps * share))) for share in shares + early}
    for step in range(1, steps + 1):
        batch = torch.randint(len(data.train_images), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(data.train_images[batch]), data.train_labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if step in looks:
            run.probes.append(_probe(network, data, step))
        advance()
    run.loss = float(total) / steps
    return run


@torch.no_grad()
def _probe(network: nn.Sequential, data: Dataset, step: int) -> Probe:
    network.eval()
    images = data.test_images[:1000]
    inputs = hidden_inputs(network, images)
    unit = inputs[-1][:, 0]
    quantiles = torch.tensor(PERCENTILES) / 100
    probe = Probe(
        step,
        accuracy(network, data.test_images, data.test_labels),
        tuple(unit.quantile(quantiles).tolist()),
        float(torch.cat([_saturated(x).flatten() for x in inputs]).float().mean()),
    )
    network.train()
    return probe


def _saturated(x: Tensor) -> Tensor:
    """Return which units are saturated at the input ``x`` of a sigmoid, by the definition that ``watch`` uses."""
    sigmoid = activation_of("sigmoid", {})
    assert sigmoid is not None
    return (x < sigmoid.low) | (x > sigmoid.high)


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of pictures that the network, in the mode it is in, classifies right."""
    return float((network(images).argmax(1) == labels).float().mean())


def favourite_learning_rate(
    data: Dataset, rates: tuple[float, ...], *, steps: int, seed: int, advance: Callable[[], None] = lambda: None
) -> tuple[float, dict[float, float]]:
    """Return the rate at which the plain network has the lowest mean training loss, and the loss at every rate."""
    losses = {
        rate: train(data, norm=False, learning_rate=rate, steps=steps, seed=seed, probes=1, advance=advance).loss
        for rate in rates
    }
    finite = {rate: loss for rate, loss in losses.items() if loss == loss}
    return min(finite, key=lambda rate: finite[rate]), losses
