"""Where samples of a batch see each other, and in which order modules run; the model is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.diagnosis.conftest import passes_of
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from batchnorm.diagnosis.passes import Passes
from batchnorm.diagnosis.probe import find_leak, order_of


class Does(nn.Module):
    """Some function of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def passes(*between: nn.Module, size: int = 16) -> Passes:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *between, nn.BatchNorm1d(4)).eval()
    return passes_of(model, [torch.randn(2, 3), torch.randn(size, 3)])


def hooks_on() -> int:
    return len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks)


MIXING = {
    "mean": lambda x: x - x.mean(0),
    "tiny": lambda x: x + 0.01 * x.sum(),
    "statistics": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "softmax": lambda x: x.softmax(0),
}


@pytest.mark.parametrize("name", MIXING)
def test_the_module_that_mixes_samples_is_named_not_one_that_contains_it(name: str) -> None:
    leak = find_leak(passes(nn.Sequential(nn.ReLU(), Does(MIXING[name])), nn.Tanh()))
    assert leak is not None
    assert leak.layer == "1.1"
    assert leak.difference > 0
    assert leak.size > 0
    assert hooks_on() == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu(),
        lambda x: x / x.norm(dim=1, keepdim=True),
        lambda x: x + torch.randn_like(x),  # the same numbers in both runs
        lambda x: x * len(x),
    ],
)
def test_samples_by_themselves_are_no_leak(function: Any) -> None:
    assert find_leak(passes(Does(function))) is None


def test_a_model_that_never_gives_the_same_twice_tells_nothing() -> None:
    calls: list[int] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return x + len(calls)

    assert find_leak(passes(Does(counted))) is None


def test_a_model_that_refuses_the_samples_tells_nothing() -> None:
    def refuses(x: Tensor) -> Tensor:
        if len(x.unique(dim=0)) < len(x):
            raise ValueError("twice the same sample")
        return x - x.mean(0)

    assert find_leak(passes(Does(refuses))) is None
    assert hooks_on() == 0


@pytest.mark.parametrize(("size", "found"), [(3, False), (4, True), (5, True), (64, True)])
def test_four_samples_are_the_fewest(size: int, found: bool) -> None:
    assert (find_leak(passes(Does(MIXING["mean"]), size=size)) is not None) is found


def test_modules_are_placed_by_their_first_call() -> None:
    class Order(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.never, self.second, self.first = nn.ReLU(), nn.BatchNorm1d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.second(self.first(x)))

    assert order_of(passes_of(Order().eval(), [torch.ones(2, 3)])) == {"": 0, "first": 1, "second": 2}
    assert hooks_on() == 0
