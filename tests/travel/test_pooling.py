"""Means, maxima and padding: maps of channels cross, if what is padded with and the order allow it."""

from __future__ import annotations

import pytest
import torch
from tests.travel.crossing import apply, assert_crosses, backward, channels, forward, randn
from torch.nn import functional as F

from batchnorm.dataflow.refusal import Refusal

X = randn(2, 3, 4, 4)
MAP = channels([2.0, -1.0, 3.0], [1.0, 0.0, -2.0])
POSITIVE = channels([2.0, 0.5, 3.0], [1.0, 0.0, -2.0])
SCALE = channels([2.0, -1.0, 3.0], [0.0, 0.0, 0.0])
ROWS = channels([1.0, 2.0, 3.0, 4.0], [0.0] * 4, axis=2)


@pytest.mark.parametrize("run", [
    lambda x: F.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), lambda x: x.mean((2, 3), keepdim=True),
    lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
])  # fmt: skip
def test_a_map_of_channels_crosses_what_mixes_positions(run) -> None:
    assert_crosses(run, MAP, X)


@pytest.mark.parametrize("run", [lambda x: F.avg_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)])
def test_a_map_of_positions_does_not(run) -> None:
    with pytest.raises(Refusal, match="not the same at all positions"):
        forward(run, ROWS, X)


@pytest.mark.parametrize("run", [
    lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 2, divisor_override=3),
])  # fmt: skip
def test_zeros_that_are_counted_let_scales_through_only(run) -> None:
    assert_crosses(run, SCALE, X)
    with pytest.raises(Refusal, match="no shift can cross it"):
        backward(run, MAP, X)


@pytest.mark.parametrize("run", [lambda x: F.max_pool2d(x, 2), lambda x: x.amax((2, 3), keepdim=True)])
def test_maxima_keep_the_order(run) -> None:
    assert_crosses(run, POSITIVE, X)
    for attempt in (backward, forward):
        with pytest.raises(Refusal, match="No negative scale can cross"):
            attempt(run, MAP, X)


def test_positions_of_maxima_do_not_survive_a_scale_of_zero() -> None:
    def run(x):
        return torch.ops.aten.max_pool2d_with_indices(x, [2, 2])

    flat = channels([2.0, 0.0, 3.0], [0.0] * 3)
    with pytest.raises(Refusal, match="also returns the positions of the maxima"):
        forward(run, flat, X)
    values, positions = forward(run, POSITIVE, X)
    assert positions.is_identity
    torch.testing.assert_close(run(apply(POSITIVE, X))[0], apply(values, run(X)[0]))


def test_axes_that_are_reduced_away() -> None:
    (after,) = forward(lambda x: x.mean((2, 3)), MAP, X)
    torch.testing.assert_close(apply(MAP, X).mean((2, 3)), apply(after, X.mean((2, 3))))
    ((_, before),) = backward(lambda x: x.mean((2, 3)), channels([2.0, 1.0, 0.5], [1.0, 2.0, 3.0], dim=2), X)
    assert before.scale.shape == (1, 3, 1, 1)
    with pytest.raises(Refusal, match="over the axis of the channels"):
        forward(lambda x: x.mean(1), MAP, X)


def test_what_is_padded_with_has_to_stay_what_it_is() -> None:
    assert_crosses(lambda x: F.pad(x, (1, 1, 0, 2)), SCALE, X)
    ones = channels([2.0, 3.0, 1.0], [-1.0, -2.0, 0.0])  # maps 1 to 1
    assert_crosses(lambda x: F.pad(x, (1, 1), value=1.0), ones, X)
    with pytest.raises(Refusal, match="pads with 1, which is not what the norm makes of 1"):
        backward(lambda x: F.pad(x, (1, 1), value=1.0), SCALE, X)
    with pytest.raises(Refusal, match="pads the axis of the channels"):
        backward(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), channels([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5), X)
