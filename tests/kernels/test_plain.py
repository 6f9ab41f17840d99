from __future__ import annotations

import pytest
import torch

from batchnorm.kernels.contract import Counters
from batchnorm.kernels.plain import is_counter, is_ordinary, is_per_channel, is_plain, takes_steps


class Subclass(torch.Tensor):
    """Its values may be anywhere."""


ONE = torch.ones(3)


@pytest.mark.parametrize(("tensor", "ordinary", "plain"), [
    (ONE, True, True),
    (torch.nn.Parameter(ONE), True, True),
    (ONE.expand(2, 3), True, True),
    (ONE.to("meta"), True, False),
    (ONE.as_subclass(Subclass), False, False),
    (ONE.to_sparse(), False, False),
    (torch._neg_view(ONE), False, False),
])  # fmt: skip
def test_plain_is_what_has_its_values_where_address_and_strides_say(tensor, ordinary: bool, plain: bool) -> None:
    assert is_ordinary(tensor) is ordinary
    assert is_plain(tensor) is plain


def test_one_value_for_each_channel_side_by_side() -> None:
    assert is_per_channel(ONE, torch.float32, 3)
    assert not is_per_channel(ONE, torch.float64, 3)
    assert not is_per_channel(ONE, torch.float32, 4)
    assert not is_per_channel(torch.ones(6)[::2], torch.float32, 3)


def test_a_counter_is_one_whole_number_or_none() -> None:
    assert is_counter(None)
    assert is_counter(torch.zeros((), dtype=torch.int64))
    assert not is_counter(torch.zeros(2, dtype=torch.int64))
    assert not is_counter(torch.zeros(()))


def test_steps_are_taken_by_float_buffers_of_one_dtype() -> None:
    counters = Counters(torch.zeros((), dtype=torch.int64), None)
    assert takes_steps(ONE, ONE.clone(), counters)
    assert takes_steps(ONE.double(), ONE.double(), counters)
    assert not takes_steps(ONE, ONE.double(), counters)
    assert not takes_steps(ONE.half(), ONE.half(), counters)
    assert not takes_steps(torch.ones(6)[::2], ONE, counters)
    assert not takes_steps(ONE, ONE.clone(), Counters(torch.zeros(()), None))
    assert not takes_steps(torch.nn.Parameter(ONE), ONE.clone(), counters)
