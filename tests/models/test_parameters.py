from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.models.parameters import find_tensor, is_within, put_parameter, qualified


def model() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(2, 3, bias=False))


def test_parameters_and_buffers_are_found_by_their_names() -> None:
    net = model()
    named = dict(net.named_parameters()) | dict(net.named_buffers())
    assert all(find_tensor(net, name) is tensor for name, tensor in named.items())
    assert find_tensor(net[1], "weight") is net[1].weight


def test_an_empty_place_and_no_name_are_none() -> None:
    assert find_tensor(model(), "1.bias") is None
    assert find_tensor(model(), None) is None


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        find_tensor(model(), "1.gamma")
    with pytest.raises(AttributeError):
        find_tensor(model(), "2.weight")


def test_a_parameter_takes_the_place_of_another_or_empties_it() -> None:
    net, bias = model(), nn.Parameter(torch.ones(3))
    put_parameter(net, "1.bias", bias)
    assert net[1].bias is bias
    put_parameter(net, "1.bias", None)
    assert find_tensor(net, "1.bias") is None


def test_names_of_what_is_in_a_module_and_in_the_model_itself() -> None:
    assert (qualified("0.bn", "weight"), qualified("", "weight")) == ("0.bn.weight", "weight")
    assert is_within("0.bn.weight", "0")
    assert not is_within("01.weight", "0")
    assert is_within("weight", "")
    assert not is_within("", "")
