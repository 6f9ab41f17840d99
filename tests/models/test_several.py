"""Several runs in one dataflow: they share the model's state, and begin with the model as it is."""

import pytest
import torch
from torch import nn

from batchnorm.dataflow.run import as_float64, run
from batchnorm.dataflow.trace import trace
from batchnorm.models.several import EXAMPLE, Several, each, first, labelled


def several(*inputs):
    return Several(inputs, tuple(f"run {number}" for number in range(len(inputs))))


def test_one_is_the_only_of_several():
    x, y = torch.ones(1), torch.zeros(1)
    assert each(x) == (x,)
    assert first(several(x, y)) is x
    assert [i.dtype for i in as_float64(several(x, y))] == [torch.float64] * 2


def test_runs_share_parameters_and_nothing_else():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    graph = trace(net, several(torch.ones(2, 3), torch.ones(5, 3)))
    assert [(call.name, call.run, call.index) for call in graph.calls] == [
        ("linear", 0, 0), ("relu", 0, 1), ("linear", 1, 2), ("relu", 1, 3),
    ]  # fmt: skip
    one, other = graph.calls[0], graph.calls[2]
    assert one.args["weight"] is other.args["weight"]
    assert one.args["input"] is not other.args["input"]
    assert len(graph.readers(one.args["weight"])) == 2
    alone = graph.of_run(1)
    assert alone.calls == graph.calls[2:]
    assert len(alone.readers(one.args["weight"])) == 1
    assert [value.shape for value in alone.outputs] == [(5, 4)]
    assert [item.name for item in alone.module_calls] == ["", "0", "1"]


def test_each_run_begins_with_the_buffers_as_they_are():
    norm = nn.BatchNorm1d(3)
    graph = trace(norm, several(torch.randn(4, 3), torch.randn(6, 3)))
    calls = [call for call in graph.calls if call.name == "batch_norm"]
    assert [call.args["running_mean"].kind for call in calls] == ["state", "state"]
    assert calls[0].args["running_mean"] is calls[1].args["running_mean"]
    assert int(norm.num_batches_tracked) == 0


def test_outputs_of_several_runs_say_of_which_they_are():
    outputs = run(nn.Identity(), several(torch.ones(2), torch.zeros(3)))
    assert [(o.where, o.tensor.shape[0]) for o in outputs] == [("", 2), (" on run 1", 3)]


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is loaded")
def test_seeds_of_runs_are_not_noted_for_a_device_that_is_loaded_later(monkeypatch: pytest.MonkeyPatch):
    noted = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", noted.append)
    torch.manual_seed(3)
    assert noted == [3]
    graph = trace(nn.Dropout(0.5), several(torch.ones(2), torch.ones(3), torch.ones(4)))
    assert len(graph.calls) == 3
    assert noted == [3]


def test_each_of_the_inputs_has_a_label():
    assert labelled(3) == ((3, EXAMPLE),)
    assert labelled(Several((1, 2), (EXAMPLE, "examples[0]"))) == ((1, EXAMPLE), (2, "examples[0]"))
