from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.dataflow.trace import trace


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        y = self.a(x)
        return {"sum": torch.stack([y, y, self.b(y)]).sum(0), "y": y}


@pytest.fixture
def graph():
    return trace(Branches(), torch.ones(1, 2))


def test_readers_are_listed_once_and_in_order(graph):
    a, b, stack, _ = graph.calls
    assert graph.readers(a.output) == (b, stack)
    assert graph.readers(graph.calls[-1].output) == ()


def test_tensors_inside_lists_are_arguments(graph):
    a, b, stack, _ = graph.calls
    assert list(stack.tensor_args()) == [a.output, a.output, b.output]


def test_outputs_are_found_by_identity(graph):
    a, b, _, total = graph.calls
    assert graph.is_output(total.output)
    assert graph.is_output(a.output)
    assert not graph.is_output(b.output)


def test_only_reader_needs_nobody_else(graph):
    a, b, stack, total = graph.calls
    assert graph.only_reader(b.output) is stack
    assert graph.only_reader(a.output) is None
    assert graph.only_reader(total.output) is None
    stack.output.held_by.append("a hook of c")
    assert graph.only_reader(stack.output) is None


def test_other_readers_are_phrases(graph):
    a, b, *_ = graph.calls
    a.output.held_by.append("a hook of c")
    assert graph.other_readers(a.output, {b}) == [
        "stack in the model",
        "the caller of the model (it is an output)",
        "a hook of c",
    ]


def test_runs_of_a_module_hold_its_operators(graph):
    (whole,) = graph.runs_of("")
    (run,) = graph.runs_of("a")
    assert run.calls == [graph.calls[0]]
    assert whole.calls == graph.calls
    assert whole.outputs == graph.outputs
    assert graph.runs_of("nobody") == []


def test_single_output_only(graph):
    call = trace(nn.Flatten(), torch.ones(1, 2, 2)).calls[0]
    assert call.output.shape == (1, 4)
    call.outputs = ()
    with pytest.raises(ValueError, match="not enough values"):
        _ = call.output
