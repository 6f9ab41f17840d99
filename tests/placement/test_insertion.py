from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import StateError
from batchnorm.placement.insertion import Insertion, KeyChanges


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


INSERTION = ("conv", 4, 4)


def test_undo_puts_the_very_layer_and_bias_back() -> None:
    model = net()
    layer, bias = model[0], model[0].bias
    order = list(model._modules)
    insertion = Insertion(("0",), *INSERTION)
    insertion.undo(model)  # nothing was done yet
    assert insertion.do(model) == KeyChanges({"0.weight": "0.conv.weight"}, ["0.bias"])
    assert model[0].conv is layer
    assert layer.bias is None
    insertion.undo(model)
    assert model[0] is layer
    assert layer.bias is bias
    assert list(model._modules) == order


def test_a_layer_without_a_bias_loses_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    insertion = Insertion(("0",), *INSERTION)
    assert insertion.do(model).dropped == []
    assert not model[0].norm.running_mean.any()
    insertion.undo(model)
    assert model[0].bias is None


def test_a_new_norm_starts_as_the_identity_in_eval_mode() -> None:
    model = net().double().eval()
    bias = model[0].bias.detach().clone()
    Insertion(("0",), *INSERTION).do(model)
    norm = model[0].norm
    assert torch.equal(norm.running_mean, -bias)
    assert torch.equal(norm.running_var + norm.eps, torch.ones(4, dtype=torch.float64))
    assert not norm.training


@pytest.mark.parametrize("slots", [("2",), ("1",), ("0", "1")])
def test_a_layer_that_is_not_there_is_refused(slots: tuple[str, ...]) -> None:
    with pytest.raises(StateError, match="expected the layer that was there"):
        Insertion(slots, *INSERTION).do(net())
