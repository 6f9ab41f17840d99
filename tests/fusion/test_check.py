"""Fused norms are compared with unfused ones in every mode, and those with which the model differs are left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import InputError
from batchnorm.functional import use_backend
from batchnorm.fusion.check import mark, mark_those_that_hold
from batchnorm.nn import BatchNorm1d
from batchnorm.nn import pending as pending_module
from batchnorm.nn.select import named_norms

pytestmark = pytest.mark.usefixtures("deferring")


def model(*blocks):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3), block()) for block in blocks))


def hold(net, x=None):
    norms = named_norms(net)
    failing = mark_those_that_hold(net, torch.randn(4, 3) if x is None else x, norms, list(norms))
    assert [name for name, norm in norms.items() if not norm.fused] == list(failing)
    return failing


def test_the_mark_is_set_and_taken_back():
    net = model(nn.ReLU, nn.ReLU)
    norms = named_norms(net)
    mark(norms, ["1.1"])
    assert [norm.fused for norm in norms.values()] == [False, True]
    mark(norms, [])
    assert all("fused" not in norm.__dict__ for norm in norms.values())


def test_all_hold():
    net = model(nn.ReLU, nn.SiLU, nn.Tanh)
    assert hold(net) == {}


class OwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class Own(nn.Module):
    def forward(self, x):
        return OwnGradient.apply(x)


def test_an_activation_with_a_gradient_of_its_own_is_found():
    failing = hold(model(nn.ReLU, Own, nn.ReLU, Own))
    assert set(failing) == {"1.1", "3.1"}
    assert failing["1.1"].startswith("With it fused the model stops: ")


class WrongInTraining(nn.Module):
    def forward(self, x):
        return torch.relu(x) if type(x) is torch.Tensor or not self.training else torch.relu(x) * 1.001


def test_a_difference_in_one_mode_is_found():
    net = model(nn.ReLU, WrongInTraining).eval()
    failing = hold(net)
    assert set(failing) == {"1.1"}
    assert failing["1.1"].startswith("With it fused the output differs by 0.00")


class Second(nn.Module):
    """Stops the second time that it is given a tensor that waits."""

    seen = 0

    def forward(self, x):
        Second.seen += isinstance(x, pending_module.Pending)
        if Second.seen == 2:
            Second.seen = 0
            raise ValueError("twice")
        return torch.relu(x)


def test_where_no_half_is_to_blame_none_is_fused():
    class First(Second):
        def forward(self, x):
            Second.seen = 0
            return super().forward(x)

    assert hold(model(First, Second)) == dict.fromkeys(["0.1", "1.1"], "With it fused the model stops: twice")


def test_rounding_is_no_difference(monkeypatch):
    net = model(*[nn.GELU] * 4)
    original = pending_module._Source.compute

    def by_another_kernel(source, activation, residual):
        with use_backend("reference" if activation else "torch"):
            return original(source, activation, residual)

    monkeypatch.setattr(pending_module._Source, "compute", by_another_kernel)
    assert hold(net, torch.randn(64, 3)) == {}


class NeedsEval(nn.Module):
    def forward(self, x):
        assert not self.training
        return torch.relu(x)


def test_modes_in_which_the_model_does_not_run_are_left_out():
    net = model(nn.ReLU, NeedsEval)
    assert hold(net) == {}
    assert hold(net.train(), torch.randn(1, 3)) == {}
    with pytest.raises(InputError, match="Sequential fails on the example inputs"):
        hold(net, torch.randn(1, 4))


def test_mixed_modes_are_tried_as_they_are():
    net = model(nn.ReLU, NeedsEval).train()
    net[1][2].eval()
    assert hold(net) == {}


def test_everything_is_left_as_it_was():
    net = model(nn.ReLU, nn.Dropout).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.randn(4, 3)
    generator = torch.get_rng_state()
    hold(net, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
