"""An embedding takes a map of its features into every row; it reads indices, which no map reaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.absorbers.embedding import Embedding
from batchnorm.absorbers.operator import LayerParameters
from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace
from batchnorm.travel.maps import Map

X = torch.tensor([[0, 2, 1], [3, 3, 0]])


def test_every_row_is_mapped():
    layer = nn.Embedding(4, 3).double()
    call = trace(layer, X).calls[0]
    scale, shift = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    absorbed = Embedding().backward(call, [Map.per_channel(scale, shift, 3, axis=2)], None)
    new = Embedding().merge(call, absorbed, LayerParameters(layer.weight.detach()), None)
    torch.testing.assert_close(new.weight[X], scale * layer(X).detach() + shift)
    assert new.bias is None
    assert not Embedding().needs_bias(absorbed)


def test_a_map_along_another_axis_is_refused():
    call = trace(nn.Embedding(4, 3), X).calls[0]
    with pytest.raises(Refusal, match=r"axis 1 of .*, while the output channels of embedding"):
        Embedding().backward(call, [Map.per_channel(torch.ones(3), torch.zeros(3), 3, axis=1)], None)


def test_no_map_goes_on_through_it():
    call = trace(nn.Embedding(4, 3), X).calls[0]
    with pytest.raises(Refusal, match="embedding reads it, which is no linear operator"):
        Embedding().forward(call, {call.args["indices"]: Map.identity(2)}, None)
