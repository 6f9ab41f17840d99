"""Sums, products and concatenations: what each operand has to become, and when no map can cross."""

from __future__ import annotations

import pytest
import torch
from tests.travel.crossing import apply, assert_crosses, backward, channels, forward, randn, traced
from torch import Tensor

from batchnorm.dataflow.refusal import Refusal
from batchnorm.travel.join import added_factor, varying_factor
from batchnorm.travel.rules import go_forward

X, Y = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
MAP = channels([2.0, -1.0, 3.0], [1.0, 0.0, -2.0])
SCALE = channels([2.0, -1.0, 3.0], [0.0, 0.0, 0.0])
GAIN = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64).view(3, 1, 1)


@pytest.mark.parametrize("run", [
    lambda x, y: x + y, lambda x, y: x - y, lambda x, y: torch.add(x, y, alpha=-0.5), lambda x, y: torch.cat([x, y], 1),
])  # fmt: skip
def test_two_operands_that_become_what_is_asked_give_what_is_wanted(run) -> None:
    joined = run(X, Y)
    numbers = [2.0, -1.0, 3.0, 0.0, 4.0, 1.0][: joined.shape[1]]
    wanted = channels(numbers, [1.0, 0.0, -2.0, 5.0, 6.0, 7.0][: joined.shape[1]])
    new = [apply(map_, x) for (_, map_), x in zip(backward(run, wanted, X, Y), (X, Y), strict=True)]
    torch.testing.assert_close(run(*new), apply(wanted, joined))


@pytest.mark.parametrize("run", [lambda x: x + 2.5, lambda x: x - 3, lambda x: x * -0.5, lambda x: x / 4])
def test_numbers(run) -> None:
    assert_crosses(run, MAP, X)


@pytest.mark.parametrize("run", [lambda x, p: x * p, lambda x, p: p * x, lambda x, p: x / p, lambda x, p: x + p,
                                 lambda x, p: x - p, lambda x, p: p - x])  # fmt: skip
def test_parameters(run) -> None:
    ((_, before),) = backward(run, MAP, X, parameter=GAIN)
    torch.testing.assert_close(run(apply(before, X), GAIN), apply(MAP, run(X, GAIN)))
    call, known = traced(run, X, parameter=GAIN)
    varying = next(value for value in call.tensor_args() if value.kind == "input")
    (after,) = go_forward(call, {varying: MAP}, known)
    torch.testing.assert_close(run(apply(MAP, X), GAIN), apply(after, run(X, GAIN)))


def test_a_value_added_to_itself_is_shifted_by_half() -> None:
    ((_, before),) = backward(lambda x: x + x, MAP, X)
    torch.testing.assert_close(apply(before, X) * 2, apply(MAP, 2 * X))


def test_only_a_scale_crosses_a_product_of_two_computed_tensors() -> None:
    ((_, before),) = backward(lambda x, y: x * y, SCALE, X, Y)
    torch.testing.assert_close(apply(before, X) * Y, apply(SCALE, X * Y))
    with pytest.raises(Refusal, match="No shift can cross mul by a computed tensor"):
        backward(lambda x, y: x * y, MAP, X, Y)


@pytest.mark.parametrize(("run", "map_", "said"), [
    (lambda x, y: x + y, MAP, "adds it to a tensor that is not scaled alike"),
    (lambda x, y: y / x, SCALE, "divides another tensor"),
    (lambda x, y: x * y, MAP, "No shift can cross mul by a computed tensor"),
])  # fmt: skip
def test_what_cannot_go_on(run, map_, said) -> None:
    call, known = traced(run, X, Y)
    first = call.args["other"] if "divides" in said else call.args["self"]
    with pytest.raises(Refusal, match=said):
        go_forward(call, {first: map_}, known)


@pytest.mark.parametrize(("run", "said"), [
    (lambda x: x / 0, "div divides by zero"),
    (lambda x: x * 0, "No shift can cross mul by zero"),
    (lambda x: torch.div(x, 2, rounding_mode="floor"), "div rounds"),
])  # fmt: skip
def test_what_cannot_go_back(run, said) -> None:
    with pytest.raises(Refusal, match=said):
        backward(run, MAP, X)


def test_an_operand_that_is_broadcast_along_the_channels_cannot_take_them() -> None:
    with pytest.raises(Refusal, match="broadcast along the axis of the channels"):
        backward(lambda x, y: x + y, MAP, X, Y[:, :1].contiguous())


def test_a_concatenation_along_another_axis_keeps_the_maps_apart() -> None:
    call, known = traced(lambda x, y: torch.cat([x, y], 2), X, Y)
    (after,) = go_forward(call, {call.args["tensors"][0]: MAP}, known)
    torch.testing.assert_close(torch.cat([apply(MAP, X), Y], 2), apply(after, torch.cat([X, Y], 2)))


@pytest.mark.parametrize(("run", "factor"), [
    (lambda x, y: x + y, 1.0), (lambda x, y: x - y, -1.0), (lambda x, y: torch.sub(x, y, alpha=3), -3.0),
])  # fmt: skip
def test_the_factor_of_the_second_operand_of_a_sum(run, factor) -> None:
    assert added_factor(traced(run, X, Y)[0]) == factor


def test_the_operand_that_varies_and_its_factor() -> None:
    def of(run, *inputs: Tensor, parameter: Tensor | None = None):
        call, known = traced(run, *inputs, parameter=parameter)
        return varying_factor(call, known), call

    (value, factor), call = of(lambda x: x / 4, X)
    assert (value, factor) == (call.args["self"], 0.25)
    (value, factor), call = of(lambda x, p: p * x, X, parameter=GAIN)
    assert value is call.args["other"]
    assert torch.equal(factor, GAIN)
    assert of(lambda x, y: x * y, X, Y)[0] is None
    assert of(lambda x, p: p / x, X, parameter=GAIN)[0] is None


def test_forward_is_the_identity_where_nothing_changed() -> None:
    (after,) = forward(lambda x: x * 3, channels([1.0] * 3, [0.0] * 3), X)
    assert after.is_identity
