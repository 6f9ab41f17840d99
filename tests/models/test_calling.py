from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentTypeError
from batchnorm.models.calling import call_on_batch, call_on_example


class Recorder(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


MODEL, X, Y = Recorder(), torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], (X,), (X, (Y, Y))])
def test_the_first_tensor_of_a_batch_is_the_input(batch):
    args, kwargs = call_on_batch(MODEL, batch)
    assert len(args) == 1
    assert args[0] is X
    assert kwargs == {}


@pytest.mark.parametrize("batch", [{"a": X, "b": Y}, OrderedDict(a=X, b=Y), ({"a": X, "b": Y}, Y)])
def test_a_dict_gives_keyword_inputs(batch):
    args, kwargs = call_on_batch(MODEL, batch)
    assert args == ()
    assert kwargs["a"] is X
    assert kwargs["b"] is Y


@pytest.mark.parametrize("batch", [np.zeros(2), "images", None, (), [], (1, X), 3.0])
def test_other_batches_are_refused_with_the_way_out(batch):
    with pytest.raises(ArgumentTypeError, match=rf"a batch of type {type(batch).__name__}: .*forward=lambda"):
        call_on_batch(MODEL, batch)


def test_example_inputs_are_arguments_as_export_takes_them():
    assert call_on_example(MODEL, X)[0][0] is X
    args, kwargs = call_on_example(MODEL, (X, Y))
    assert args[0] is X
    assert args[1] is Y
    assert kwargs == {}
    args, kwargs = call_on_example(MODEL, {"a": X})
    assert args == ()
    assert kwargs["a"] is X


def test_the_models_own_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_on_batch(nn.Linear(3, 3), torch.zeros(2, 4))
