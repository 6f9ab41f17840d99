"""A module in the place of another, wherever that stands."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import StateError
from batchnorm.models.modules import become, put_module, twin
from batchnorm.models.snapshot import Structure


def test_a_module_is_put_under_its_name():
    net, new = nn.Sequential(nn.Sequential(nn.Linear(2, 2))), nn.ReLU()
    put_module(net, "0.0", new)
    assert net[0][0] is new


def test_the_model_itself_becomes_the_other_and_can_be_put_back():
    model, new = nn.Linear(2, 3), nn.Conv1d(2, 4, 1)
    held, before, state = model, Structure(model.modules()), dict(model.state_dict())
    put_module(model, "", new)
    assert held is model
    assert type(model) is nn.Conv1d
    assert torch.equal(model(torch.ones(1, 2, 5)), new(torch.ones(1, 2, 5)))
    before.restore()
    assert type(model) is nn.Linear
    assert model.out_features == 3
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_class_that_python_does_not_exchange_is_told():
    class Slotted(nn.Module):
        __slots__ = ("own",)

    model = Slotted()
    with pytest.raises(StateError, match="Slotted, the model itself, cannot become a Linear in place"):
        become(model, nn.Linear(2, 2))
    assert type(model) is Slotted


def test_a_twin_has_the_same_contents_and_registers_of_its_own():
    conv = nn.Conv2d(2, 3, 1)
    other = twin(conv)
    assert other.weight is conv.weight
    other._parameters["bias"] = None
    assert conv.bias is not None
