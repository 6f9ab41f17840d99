"""Maps are arranged as the elements are; elements that go nowhere have none, and those that go twice need one."""

from __future__ import annotations

import pytest
import torch
from tests.travel.crossing import apply, assert_crosses, backward, channels, forward, randn

from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.maps import Map

X = randn(2, 4, 3, 3)
MAP = channels([2.0, -1.0, 0.0, 3.0], [1.0, 0.0, -2.0, 0.5])


@pytest.mark.parametrize("run", [lambda x: x.flip(1), lambda x: x.roll(1, 1)])
def test_channels_in_another_order(run) -> None:
    assert_crosses(run, MAP, X)


def test_a_transposed_axis_takes_the_channels_along() -> None:
    def run(x):
        return x.permute(0, 2, 3, 1)

    assert_crosses(run, MAP, X, back=channels([2.0, -1.0, 0.0, 3.0], [1.0, 0.0, -2.0, 0.5], axis=3))
    (after,) = forward(run, MAP, X)
    assert after.scale.shape == (1, 1, 1, 4)


def test_a_view_that_puts_channels_and_positions_together() -> None:
    (after,) = forward(lambda x: x.view(2, 36), MAP, X)
    torch.testing.assert_close(apply(after, X.view(2, 36)), apply(MAP, X).view(2, 36))


def test_what_a_slice_leaves_out_is_not_changed_between_others_that_are() -> None:
    part = channels([5.0, 7.0], [1.0, 2.0])
    ((_, before),) = backward(lambda x: x[:, 1:3], part, X)
    assert before.scale.reshape(-1).tolist() == [1.0, 5.0, 7.0, 1.0]
    assert before.shift.reshape(-1).tolist() == [0.0, 1.0, 2.0, 0.0]


def test_positions_that_are_left_out_follow_the_others_so_that_the_map_is_one_of_channels() -> None:
    ((_, before),) = backward(lambda x: x[:, :, 1:], MAP, X)
    assert before.scale.shape == (1, 4, 1, 1)
    assert torch.equal(before.scale, MAP.scale)


def test_an_element_that_goes_to_two_places_needs_one_map() -> None:
    twice = channels([2.0, 3.0] * 4, [0.0] * 8)
    ((_, before),) = backward(lambda x: x.repeat(1, 2, 1, 1), channels([2.0, 3.0, 4.0, 5.0] * 2, [0.0] * 8), X)
    assert before.scale.reshape(-1).tolist() == [2.0, 3.0, 4.0, 5.0]
    with pytest.raises(Refusal, match="repeat_interleave gives one element to places that need different maps"):
        backward(lambda x: x.repeat_interleave(2, 1), twice, X)


def test_a_slice_of_nothing_is_refused_as_it_may_be_something_at_another_size() -> None:
    with pytest.raises(Refusal, match="a part that is empty here"):
        backward(lambda x: x[:, 4:], Map.identity(4), X)
