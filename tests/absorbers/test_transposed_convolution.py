from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.absorbers.transposed_convolution import TransposedConvolution
from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace
from batchnorm.travel.maps import Map

X = torch.ones(1, 4, 5)


def test_a_scale_can_cross_it_from_before_and_a_shift_cannot():
    call = trace(nn.ConvTranspose1d(4, 2, 3), X).calls[0]
    value, row = call.args["input"], TransposedConvolution(1)
    scale, shift = torch.full((4,), 2.0), torch.ones(4)
    assert row.forward(call, {value: Map.per_channel(scale, torch.zeros(4), 3)}, None).side == "input"
    with pytest.raises(Refusal, match="sums of different numbers of terms"):
        row.forward(call, {value: Map.per_channel(scale, shift, 3)}, None)
