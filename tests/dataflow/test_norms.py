"""Which norms a run shows, whose they are, and which may stand for others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.dataflow.norms import alternative_to, is_norm, norm_uses, require_no_alternative, unreached_norms
from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace

X = torch.zeros(2, 3, 4)


class Domains(nn.Module):
    """Shares a norm between two calls, calls one as a function, and has a norm for each of two domains."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.BatchNorm1d(3)
        self.bns = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        x = F.batch_norm(self.shared(self.bns[0](x)), self.mean, self.var)
        return F.batch_norm(self.shared(x), torch.zeros(3), torch.ones(3))


@pytest.fixture
def model():
    return Domains().eval()


def test_uses_are_in_order_and_a_shared_norm_is_one(model):
    graph = trace(model, X)
    uses = norm_uses(model, graph)
    assert [use.name for use in uses] == ["bns.0", "shared", "Domains", "batch_norm in the model's forward"]
    assert [use.owner for use in uses] == [model.bns[0], model.shared, model, None]
    assert [len(use.calls) for use in uses] == [1, 2, 1, 1]
    assert sum(map(is_norm, graph.calls)) == 5
    assert unreached_norms(model, uses) == ["bns.1"]


def test_a_norm_without_any_state_is_known_by_its_class():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    (use,) = norm_uses(model, trace(model, X))
    assert (use.name, use.owner) == ("0", model[0])


def test_another_norm_may_stand_in_its_place(model):
    assert alternative_to(model, model.bns[0], ["bns.1"]) == "bns.1"
    with pytest.raises(Refusal, match=r"bns\.1 stands beside it .* Remove bns\.1"):
        require_no_alternative(model, model.bns[0], ["bns.1"])
    require_no_alternative(model, None, ["bns.1"])


def test_no_alternative_has_other_channels_another_name_or_a_layer_of_its_own(model):
    model.bns[1] = nn.BatchNorm1d(4)
    assert alternative_to(model, model.bns[0], ["bns.1"]) is None
    assert alternative_to(model, model.shared, ["bns.1"]) is None
    grid = nn.ModuleDict({n: nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)]) for n in "ab"})
    assert alternative_to(grid, grid["a"][0], ["b.1"]) is None  # two parts of the name differ
    assert alternative_to(grid, grid["a"][0], ["b.1", "b.0"]) == "b.0"
    heads = nn.ModuleDict({n: nn.ModuleDict({"fc": nn.Linear(3, 3), "bn": nn.BatchNorm1d(3)}) for n in "ab"})
    assert alternative_to(heads, heads["a"]["bn"], ["b.bn"]) is None
