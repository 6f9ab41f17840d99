"""Numbers that a program computes are tensors where it computes with them."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from batchnorm.folding.program.numbers import numbers_as_tensors


class Sized(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = [way]

    def forward(self, x):
        return self.way[0](x)


WAYS = {
    "size": lambda x: x * x.size(0),
    "shape": lambda x: x + x.shape[1],
    "arithmetic": lambda x: x / (x.shape[0] * 2 + x.size(1)) ** 0.5,
    "method": lambda x: x.mul(x.shape[1]),
    "whole": lambda x: x.long() * x.shape[1],
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("exported", [False, True])
def test_operands_that_are_numbers_of_the_run_become_tensors_and_nothing_else_changes(name, exported):
    x = torch.randn(3, 5)
    program = torch.fx.symbolic_trace(Sized(WAYS[name]))
    if exported:
        program = export(Sized(WAYS[name]), (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},)).module()
    expected = program(x)
    numbers_as_tensors(program.graph)
    program.recompile()
    assert any(getattr(node.target, "__name__", "") == "_tensor" for node in program.graph.nodes)
    result = program(x)
    assert result.dtype == expected.dtype
    assert torch.allclose(result, expected)
    assert torch.allclose(program(torch.ones(2, 7)), WAYS[name](torch.ones(2, 7)).to(result.dtype))


def test_sizes_of_views_and_pads_stay_numbers():
    program = torch.fx.symbolic_trace(Sized(lambda x: x.view(x.shape[0], -1).reshape(x.size(0), x.size(1)) * 2))
    before = len(program.graph.nodes)
    numbers_as_tensors(program.graph)
    assert len(program.graph.nodes) == before
