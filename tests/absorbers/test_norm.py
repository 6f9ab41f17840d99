"""A norm with fixed statistics computes a map before it or behind it with another γ and β."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.absorbers.norm import Norm
from batchnorm.absorbers.operator import LayerParameters
from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace
from batchnorm.travel.maps import Map
from batchnorm.travel.rules import Absorbed

X = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def norm() -> nn.BatchNorm1d:
    made = nn.BatchNorm1d(4).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (made.running_mean, made.weight, made.bias):
            tensor.normal_(generator=generator)
        made.running_var.uniform_(0.5, 2, generator=generator)
    return made


class Known:
    with_borders = False

    def __init__(self, module):
        self.module = module

    def tensor(self, value):
        return self.module.get_buffer(value.names[0])


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_new_parameters_compute_both(side):
    module = norm()
    map_ = Map(*torch.randn(2, 1, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        expected = module(map_.scale * X + map_.shift) if side == "input" else map_.scale * module(X) + map_.shift
        now = LayerParameters(module.weight.clone(), module.bias.clone())
        new = Norm().merge(trace(module, X).calls[0], Absorbed(side, map_), now, Known(module))
        module.weight.copy_(new.weight)
        module.bias.copy_(new.bias)
        torch.testing.assert_close(module(X), expected, rtol=1e-12, atol=1e-12)


def test_a_norm_in_batch_mode_absorbs_nothing():
    call = trace(norm().train(), X).calls[-1]
    map_ = Map.identity(3)
    with pytest.raises(Refusal, match="batch mode stands between"):
        Norm().backward(call, [map_], None)
    with pytest.raises(Refusal, match="batch mode stands between"):
        Norm().forward(call, {call.args["input"]: map_}, None)
