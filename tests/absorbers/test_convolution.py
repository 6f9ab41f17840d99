"""What a convolution pads with when it absorbs a shift, and where it reads the very element that it computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.absorbers.convolution import Convolution, sizes
from batchnorm.absorbers.operator import LayerParameters
from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed

X = torch.randn(2, 4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROW = Convolution(2)


def call_of(**settings):
    return trace(nn.Conv2d(4, 6, **settings).double(), X).calls[0]


def vector(n, seed):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def padded(x, border, pad):
    inside = F.pad(torch.ones_like(x), [pad] * 4)
    return torch.where(inside > 0, F.pad(x, [pad] * 4), border.view(1, -1, 1, 1))


@pytest.mark.parametrize("first", ["shift and scale", "scale"])
def test_two_maps_one_after_the_other_move_what_is_padded_with_along(first):
    call = call_of(kernel_size=3, padding=1)
    now = LayerParameters(torch.randn(6, 4, 3, 3, dtype=torch.float64), vector(6, 1))
    maps = [(vector(4, 2), vector(4, 3)), (vector(4, 4), torch.zeros(4, dtype=torch.float64))]
    if first == "scale":
        maps.reverse()
    new, x, border = now, X, torch.zeros(4, dtype=torch.float64)
    for scale, shift in maps:  # each is of what the one before it left
        map_ = Map.per_channel(scale, shift, 4)
        new = ROW.merge(call, Absorbed("input", map_, bordered=not map_.only_scales), new, None)
        border = (border - shift) / scale
    for scale, shift in reversed(maps):
        x = scale.view(1, -1, 1, 1) * x + shift.view(1, -1, 1, 1)
    assert new.border is not None
    result = F.conv2d(padded(X, new.border, 1), new.weight, new.bias)
    torch.testing.assert_close(result, F.conv2d(x, now.weight, now.bias, padding=1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new.border, border)


@pytest.mark.parametrize(("settings", "zeros"), [
    ({"kernel_size": 3}, False),
    ({"kernel_size": 3, "padding": 1}, True),
    ({"kernel_size": 3, "padding": (0, 1)}, True),
    ({"kernel_size": 3, "padding": "same"}, True),
    ({"kernel_size": 3, "padding": "valid"}, False),
])  # fmt: skip
def test_a_shift_meets_zeros_where_some_are_padded(settings, zeros):
    call = call_of(**settings)

    class Known:
        with_borders = False

    value = call.args["input"]
    given = {value: Map.per_channel(vector(4, 1), vector(4, 2), 4)}
    if zeros:
        with pytest.raises(Refusal, match="pads it with zeros"):
            ROW.forward(call, given, Known())
        Known.with_borders = True
    assert ROW.forward(call, given, Known()).bordered is zeros


def test_a_parameter_cannot_be_mapped():
    call = call_of(kernel_size=1)
    with pytest.raises(Refusal, match="conv2d reads it as a parameter"):
        ROW.forward(call, {call.args["weight"]: Map.identity(4)}, None)


def test_one_size_stands_for_all_axes():
    assert (sizes(2, 3), sizes([2], 2), sizes((1, 2), 2)) == ((2, 2, 2), (2, 2), (1, 2))
