from __future__ import annotations

import copy

import torch
from torch import nn


class Twice(nn.Module):
    """One norm for the picture and for another view of it."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.scale, self.shift = scale, shift

    def forward(self, x):
        views = (x, x * self.scale + self.shift)
        return sum(self.head(torch.relu(self.bn(self.conv(view))).mean((2, 3))) for view in views)


def trained(model: nn.Module, batches: list) -> nn.Module:
    model.train()
    with torch.no_grad():
        for _ in range(12):
            for batch in batches:
                model(batch)
    return model.eval()


def test_two_inputs_of_different_distribution(found, home) -> None:
    torch.manual_seed(0)
    assert found(trained(Twice(3.0, 2.0), home)) == [("shared_norm", "bn")]


def test_two_inputs_of_one_distribution(found, home) -> None:
    torch.manual_seed(0)
    assert found(trained(Twice(1.0, 0.02), home)) == []


def test_batches_of_two_kinds(net, found, home, batches) -> None:
    def kinds(plain: list) -> list:
        return [batch if i % 2 else 3 * batch + 2 for i, batch in enumerate(plain)]

    model = trained(copy.deepcopy(net), kinds(home))
    assert found(model, kinds(batches))[0] == ("shared_norm", "bn1")
