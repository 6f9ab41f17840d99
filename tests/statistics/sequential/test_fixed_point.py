"""Norms that are called several times hold what they meet, or are named; all others hold what they meet in any case."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.statistics.sequential.networks import OnStored, gap
from torch import Tensor, nn

from batchnorm.statistics import recalibrate
from batchnorm.statistics.estimators import Pooled
from batchnorm.statistics.sequential.fixed_point import Settling, distances
from batchnorm.statistics.sites import Sites

ACTIVATIONS: dict[str, Any] = {"relu": torch.relu, "tanh": torch.tanh, "square": lambda x: x * x.abs()}


class Repeats(nn.Module):
    """A random way through few norms, each of them met several times, with a norm of its own at the end."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        torch.manual_seed(seed)
        width = choose.choice([2, 3, 5])
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(choose.randint(1, 4)))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, -1, 1)
            norm.weight.data *= choose.choice([1, 3, 10])
            nn.init.normal_(norm.bias, std=choose.choice([0.1, 1, 5]))
        self.linear = nn.Linear(width, width)
        kinds = ["norm", "norm", "residual", "linear", *ACTIVATIONS]
        self.steps = [(choose.choice(kinds), choose.randrange(len(self.norms))) for _ in range(choose.randint(3, 9))]
        self.after = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        for kind, number in self.steps:
            if kind == "norm":
                x = self.norms[number](x)
            elif kind == "residual":
                x = x + self.norms[number](x)
            else:
                x = self.linear(x) if kind == "linear" else ACTIVATIONS[kind](x)
        return self.after(x)

    def batches(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(8, self.linear.in_features, generator=generator) * 2 + 1 for _ in range(3)]


def gaps(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """How far what each norm meets in eval mode is from what it holds, where it is more than rounding."""
    model.eval()
    collector = OnStored(Sites(model, None), Pooled)
    for index, batch in enumerate(batches):
        collector.run(index, lambda batch=batch: model(batch))
    found = {}
    for site, tally in collector.tallies.items():
        held = (site.running_mean, site.running_var)
        mean, variance = tally.estimator.statistics()
        mean_off, variance_off = distances(held, (mean, variance), tally.eps)
        rounding = 1e-6 * max(1.0, float((mean.abs() / (variance + tally.eps).sqrt()).max()))
        if max(mean_off, variance_off) > 20 * rounding:
            found[site.name] = max(mean_off, variance_off)
    return found


@pytest.mark.every(3)
@pytest.mark.parametrize("seed", [3, 5, 16, 19, 20, 22, 26, 29])
def test_random_ways_come_to_rest(seed: int) -> None:
    """Of these, plain repetition leaves all from 16 on unsettled."""
    model = Repeats(seed)
    batches = model.batches(seed)
    assert recalibrate(model, batches).notes == ()
    assert gaps(model, batches) == {}


@pytest.mark.parametrize("seed", [49, 51])
def test_what_does_not_come_to_rest_is_named_and_nothing_else_is_off(seed: int) -> None:
    model = Repeats(seed)
    batches = model.batches(seed)
    (note,) = recalibrate(model, batches).notes
    off = gaps(model, batches)
    assert "after" not in off
    assert off
    assert all(f"{name} (mean by" in note for name in off)


def test_a_step_into_infinity_is_taken_back() -> None:
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.after = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.b(x) * 3)
            y = torch.where(y.abs().amax() > 30, torch.inf, y)  # far from rest
            out: Tensor = self.after(y)
            return out

    torch.manual_seed(0)
    model, batches = Explodes(), [torch.randn(16, 3) for _ in range(3)]
    recalibrate(model, batches)
    assert gaps(model, batches) == {}


class Overshoots(nn.Module):
    """Applied to its own output, with a large γ, the norm overshoots."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.b, self.after = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        nn.init.constant_(self.b.weight, gamma)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(torch.relu(self.b(self.b(x))))
        return out


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.5, 2.0, 10.0, 100.0])
def test_a_norm_that_overshoots_comes_to_rest(gamma: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Overshoots(gamma).to(dtype)
    batches = [torch.randn(16, 3, dtype=dtype) * 2 + 1 for _ in range(4)]
    result = recalibrate(model, batches)
    assert result.notes == ()
    assert gap(model, batches) < 1e-4


def test_half_precision_buffers_come_to_rest_at_their_rounding() -> None:
    torch.manual_seed(0)
    model = Overshoots(2.0).bfloat16()
    result = recalibrate(model, [torch.randn(16, 3).bfloat16() for _ in range(4)])
    assert result.notes == ()


def test_a_linear_map_that_repels_is_solved() -> None:
    """x → −3x + 4 in each mean: plain steps run away, the fixed point is 1."""
    norm = nn.BatchNorm1d(2).double()
    (site,) = Sites(norm, None).known
    settling = Settling({site: norm.eps})
    used = {site: (torch.tensor([0.0, 2.0]).double(), torch.ones(2).double())}
    for _ in range(4):
        mean, variance = used[site]
        used = settling.next(used, {site: (-3 * mean + 4, variance)})
    torch.testing.assert_close(used[site][0], torch.ones(2).double())
