"""What is measured is what ran, and leaves everything as it was. How long it took is nobody's to assert."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.folding.report.latency import Spread, measure, processor

X = torch.ones(4, 3, 16, 16)


class Twice(nn.Module):
    """Makes tensors of known size: after the first is freed, two are alive at once, and at the end one."""

    def forward(self, x):
        y = x.sqrt()
        z = y.sqrt()
        del y
        return z.sqrt()


class Noisy(nn.Module):
    """Changes all that a pass can change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x.mul_(2)) + torch.rand(1)


def test_memory_is_what_is_held_at_once_beyond_the_inputs() -> None:
    measured = measure(Twice(), nn.Identity(), X, seconds=0.01)
    assert measured.memory_before == 2 * X.numel() * 4
    assert measured.memory_after == 0
    assert "CPU allocator" in measured.memory_of


def test_both_are_run_in_turn_and_often_enough() -> None:
    before, after = Noisy(), Noisy()
    grad_modes: dict[nn.Module, list[bool]] = {before: [], after: []}  # of each call; the models keep nothing
    for model, modes in grad_modes.items():
        model.register_forward_hook(lambda *_, modes=modes: modes.append(torch.is_grad_enabled()))
    measured = measure(before, after, X, seconds=0.01)
    assert len(grad_modes[before]) == len(grad_modes[after]) >= measured.rounds * measured.calls
    assert measured.rounds >= 7
    assert not any(grad_modes[before])
    assert before.calls == after.calls == 0
    for spread in (measured.before, measured.after):
        assert 0 < spread.lower <= spread.median <= spread.upper
    assert measured.threads == torch.get_num_threads()
    assert measured.device == processor() != ""


def test_models_inputs_random_numbers_and_the_environment_are_as_they_were() -> None:
    before, after, x = Noisy(), Noisy(), X.clone()
    states = [copy.deepcopy(model.state_dict()) for model in (before, after)]
    random, environment = torch.get_rng_state(), dict(os.environ)
    measure(before, after, {"x": x}, seconds=0.01)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(os.environ) == environment
    for state, model in zip(states, (before, after), strict=True):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_the_level_of_the_profilers_messages_that_somebody_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "3")
    seen: list[Any] = []
    model = Noisy()
    model.register_forward_hook(lambda *_: seen.append(os.environ["KINETO_LOG_LEVEL"]))
    measure(model, nn.Identity(), X, seconds=0.01)
    assert set(seen) == {"3"}


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, lower=2.0, upper=4.0)
