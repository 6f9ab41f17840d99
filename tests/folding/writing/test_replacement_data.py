from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from batchnorm.errors import StateError
from batchnorm.folding.planning.replacement import _ACTIVATIONS, Replacement
from batchnorm.folding.writing.replacement_data import from_data, is_part, to_data

ODD = {"alpha": 0.3, "approximate": "tanh", "min_val": -0.2, "max_val": 0.7, "negative_slope": 0.4}


@pytest.mark.parametrize("kind", _ACTIVATIONS)
def test_every_activation_that_may_stay_comes_back_with_its_settings(kind: str) -> None:
    activation = _ACTIVATIONS[kind](ODD)
    (back,) = from_data(to_data(Replacement((activation,)))).parts
    assert repr(back) == repr(activation)
    x = torch.linspace(-3, 3, 31)
    assert torch.equal(back(x), activation(x))


def test_names_of_submodules_stay_names_and_nothing_is_nothing() -> None:
    assert from_data(to_data(Replacement(("drop", "act")))).parts == ("drop", "act")
    assert from_data(to_data(Replacement())).parts == ()


def test_an_activation_that_is_not_known_is_refused() -> None:
    with pytest.raises(StateError, match="have a Bilinear in the place of a module"):
        from_data([{"class": "Bilinear"}])


@pytest.mark.parametrize("part", [
    "", "drop.act", {"class": "ReLU"}, {"class": "LeakyReLU", "negative_slope": 0.2}, {"class": "OfAnotherVersion"},
    {"class": "Linear", "in_features": 3, "out_features": 2, "bias": False},
    {"class": "ScaleShift", "channels": 3, "dtype": "float32", "fused": "leaky_relu(0.1)"},
])  # fmt: skip
def test_what_a_file_may_hold(part):
    assert is_part(part)


@pytest.mark.parametrize("part", [
    "..", None, 3, [], {}, {"class": 3}, {"class": "ReLU", "inplace": True}, {"class": "LeakyReLU"},
    {"class": "LeakyReLU", "negative_slope": "0.2"}, {"class": "LeakyReLU", "negative_slope": float("nan")},
    {"class": "GELU", "approximate": "no"}, {"class": "Linear", "in_features": 3, "out_features": 2, "bias": None},
    {"class": "Linear", "in_features": 0, "out_features": 2, "bias": True},
    {"class": "ScaleShift", "channels": 3, "dtype": "load", "fused": None},
    {"class": "ScaleShift", "channels": 3, "dtype": "float32", "fused": "no_such"},
])  # fmt: skip
def test_what_a_file_may_not_hold(part):
    assert not is_part(part)


def test_a_convolution_has_its_settings_for_each_axis():
    (good,) = to_data(Replacement((nn.Conv2d(2, 3, 3, padding=1),)))
    good = json.loads(json.dumps(good))
    assert is_part(good)
    for key in ("kernel_size", "stride", "padding", "dilation"):
        for bad in ([1], [1, 1, 1], [1, -1], [1, True], 1, None, "no", [0.5, 1]):
            assert not is_part(good | {key: bad})
    assert is_part(good | {"padding": "same"})
