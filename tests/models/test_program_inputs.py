from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import InputError
from batchnorm.models.program_inputs import own_inputs


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


ONE = torch.ones(1)


def test_positional_or_keyword_inputs_come_as_a_fold_takes_them() -> None:
    assert own_inputs(torch.export.export(Sum(), (ONE, 2 * ONE))) == (ONE, 2 * ONE)
    assert own_inputs(torch.export.export(Sum(), (), {"x": ONE, "y": ONE})) == {"x": ONE, "y": ONE}


def test_both_kinds_are_refused() -> None:
    with pytest.raises(InputError, match="1 of the former and with y"):
        own_inputs(torch.export.export(Sum(), (ONE,), {"y": ONE}))


def test_none_are_refused() -> None:
    program = torch.export.export(Sum(), (ONE, ONE))
    program.example_inputs = None
    for without in (program, torch.fx.symbolic_trace(Sum())):
        with pytest.raises(InputError, match="Pass example_inputs"):
            own_inputs(without)
