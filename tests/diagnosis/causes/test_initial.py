"""Whether a norm has the values that it was constructed with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchnorm.diagnosis.causes.initial import is_constructed, is_initial, is_zero


def layer(mean: Any = 0.0, variance: Any = 1.0, weight: Any = None, bias: Any = None) -> Any:
    def channels(value: Any) -> Any:
        return None if value is None else torch.as_tensor(value).expand(2).double()

    record = SimpleNamespace(weight=channels(weight), bias=channels(bias))
    return SimpleNamespace(stored=(channels(mean), channels(variance)), record=record)


@pytest.mark.parametrize(
    ("mean", "variance", "initial"),
    [
        (0.0, 1.0, True),
        (-0.0, 1.0, True),
        ([0.0, 1e-30], 1.0, False),
        (0.0, [1.0, 0.9], False),
        (torch.nan, 1.0, False),
    ],
)
def test_initial_statistics_are_0_and_1_in_every_channel(mean: Any, variance: Any, initial: bool) -> None:
    assert is_initial(layer(mean, variance)) is initial


@pytest.mark.parametrize(
    ("weight", "bias", "constructed", "zero"),
    [
        (1.0, 0.0, True, False),
        (1.0, None, True, False),  # without β
        (0.0, 0.0, True, True),  # as the last norm of a residual branch begins
        (0.0, None, True, True),
        (1.0, [0.0, 0.1], False, False),
        (0.0, 0.1, False, False),
        ([1.0, 0.0], 0.0, False, False),  # neither all ones nor all zeros
        (None, None, False, False),  # without γ nothing can be told
        (None, 0.0, False, False),
    ],
)
def test_constructed_parameters_are_ones_or_zeros_throughout(
    weight: Any, bias: Any, constructed: bool, zero: bool
) -> None:
    one = layer(weight=weight, bias=bias)
    assert (is_constructed(one), is_zero(one)) == (constructed, zero)
