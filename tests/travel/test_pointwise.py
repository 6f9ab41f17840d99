"""Operators on single elements: which part of a map each lets through, to the sign."""

from __future__ import annotations

import pytest
import torch
from tests.travel.crossing import apply, assert_crosses, backward, channels, forward, randn, traced
from torch.nn import functional as F

from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.pointwise import operand, require_no_negative

X = randn(2, 3, 4, 4)
MAP = channels([2.0, -1.0, 3.0], [1.0, 0.0, -2.0])
SCALE = channels([2.0, 0.0, 3.0], [0.0, 0.0, 0.0])
MIXED = channels([2.0, -1.0, -3.0], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("run", [lambda x: x.clone(), lambda x: F.dropout(x, 0.5, False), lambda x: -x])
def test_what_is_the_identity_or_its_negative_lets_every_map_through(run) -> None:
    assert_crosses(run, MAP, X)


@pytest.mark.parametrize("run", [F.relu, lambda x: F.leaky_relu(x, 0.1)])
def test_a_kink_at_zero_lets_scales_through_that_are_not_negative(run) -> None:
    assert_crosses(run, SCALE, X)
    for attempt in (backward, forward):
        with pytest.raises(Refusal, match="whose slope changes at zero"):
            attempt(run, MAP, X)
        with pytest.raises(Refusal, match="and 2 of 3 are negative"):
            attempt(run, MIXED, X)


def test_an_absolute_value_lets_scales_on_without_their_sign() -> None:
    (after,) = forward(torch.abs, MIXED, X)
    torch.testing.assert_close(apply(MIXED, X).abs(), apply(after, X.abs()))
    with pytest.raises(Refusal, match="No shift can cross abs"):
        forward(torch.abs, MAP, X)
    with pytest.raises(Refusal, match="output of abs, which is no linear operator"):
        backward(torch.abs, SCALE, X)


def test_what_changes_numbers_at_random_or_their_type_is_not_crossed() -> None:
    with pytest.raises(Refusal, match="output of dropout, which is on"):
        backward(lambda x: F.dropout(x, 0.5, True), MAP, X)
    with pytest.raises(Refusal, match="changes the type of the numbers"):
        backward(lambda x: x.to(torch.float32), MAP, X)


def test_dropout_with_probability_zero_is_the_identity() -> None:
    assert_crosses(lambda x: F.dropout(x, 0.0, True), MAP, X)


def test_the_operand_is_the_first_tensor() -> None:
    call, _ = traced(torch.sub, X, X.clone())
    assert operand(call) is call.args["self"]


@pytest.mark.parametrize(("scale", "said"), [([-1.0, 2.0], "1 of 2 is negative"), ([-1.0, -2.0], "2 of 2 are")])
def test_negative_scales_are_counted(scale, said) -> None:
    call, _ = traced(F.relu, X)
    require_no_negative(call, channels([1.0, 0.0], [0.0, 0.0]))
    with pytest.raises(Refusal, match=said):
        require_no_negative(call, channels(scale, [0.0, 0.0]))
