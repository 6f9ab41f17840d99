"""Networks whose running statistics are right, and data like those they were measured on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.diagnosis.metrics import CLASSES
from torch import Tensor, nn

import batchnorm
from batchnorm.diagnosis.passes import Passes
from batchnorm.diagnosis.readings import Measure
from batchnorm.diagnosis.sites import EverySite
from batchnorm.models.calling import call_on_batch

STEPS = 80  # of 0.1 momentum: 0.9⁸⁰ = 2e-4 of the initial values are left


class Net(nn.Module):
    """Two convolutions and two linear layers, each before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16)
        self.fc3, self.bn3 = nn.Linear(16, 32), nn.BatchNorm1d(32)
        self.fc4, self.bn4 = nn.Linear(32, 24), nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x))).mean((2, 3))
        x = torch.relu(self.bn3(self.fc3(x)))
        return self.head(torch.relu(self.bn4(self.fc4(x))))


def images(count: int, seed: int) -> Tensor:
    """Images (N, 3, 8, 8) with structure: smooth fields with a mean of their own in each channel."""
    g = torch.Generator().manual_seed(seed)
    field = nn.functional.interpolate(torch.randn(count, 3, 3, 3, generator=g), size=(8, 8), mode="bilinear")
    return (
        1.2 * field + torch.tensor([0.3, -0.2, 0.5]).view(1, 3, 1, 1) + 0.3 * torch.randn(count, 3, 8, 8, generator=g)
    )


def settle(model: nn.Module, size: int = 64, steps: int = STEPS) -> nn.Module:
    """Let the running statistics arrive, as training does; weights stay as they are."""
    model.train()
    with torch.no_grad():
        for step in range(steps):
            model(images(size, 1000 + step))
    return model.eval()


def passes_of(model: nn.Module, data: list[Tensor], metric: Measure | None = None) -> Passes:
    """Passes of a model over batches, as a diagnosis makes them."""
    return Passes(model, EverySite(model), data, call_on_batch, metric)


@pytest.fixture(scope="session")
def _settled() -> nn.Module:
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2, model.bn3, model.bn4):
            norm.weight.uniform_(0.6, 1.4)
            norm.bias.uniform_(-0.3, 0.3)
        model.conv1.weight.mul_(3)
    return settle(model)


@pytest.fixture
def net(_settled: nn.Module) -> Net:
    """A healthy network in eval mode."""
    return copy.deepcopy(_settled)


@pytest.fixture(scope="session")
def batches() -> list[Tensor]:
    """Six batches of 64 like those of training."""
    return list(images(384, 7).split(64))


@pytest.fixture(scope="session")
def home() -> list[Tensor]:
    """Training batches."""
    return list(images(384, 8).split(64))


@pytest.fixture
def found(batches: list[Tensor]) -> Callable[..., list[tuple[str, str]]]:
    """Return a function that diagnoses a model and gives (cause, layer) of each finding, its cures tried out."""

    def diagnosed(model: nn.Module, on: list[Tensor] | None = None, **options: object) -> list[tuple[str, str]]:
        on = batches if on is None else on
        result = batchnorm.diagnose(model, on, **options)
        for finding in result.findings:
            patient = copy.deepcopy(model)
            exec(finding.cure, {"model": patient, "batches": on, "batchnorm": batchnorm, "torch": torch})
        return [(finding.cause, finding.layer) for finding in result.findings]

    return diagnosed


@pytest.fixture
def labelled(net, batches):
    """The batches with the classes that the network gives, and with its values."""

    with torch.no_grad():  # all classes, not one
        net.head.bias.sub_(net(torch.cat(batches)).mean(0))

    def made(metric, on=None):
        with torch.no_grad():
            outputs = [net(batch) for batch in batches]
        wanted = [out.argmax(1) if metric in CLASSES else out for out in outputs]
        return list(zip(on or batches, wanted, strict=True))

    return made
