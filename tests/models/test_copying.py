from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from batchnorm.errors import StateError
from batchnorm.models.copying import copy_model


def test_a_copy_shares_nothing_and_keeps_what_is_shared_within() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    copied = copy_model("verb", model, "")
    assert isinstance(copied, nn.Sequential)
    assert copied[0] is copied[1]
    assert copied[0] is not layer
    assert torch.equal(copied[0].weight, layer.weight)
    assert copied[0].weight.data_ptr() != layer.weight.data_ptr()


def test_tensors_with_a_history_are_copied_without_it() -> None:
    model = nn.Linear(2, 2)
    model.kept = [model(torch.ones(1, 2))]  # type: ignore[assignment]
    copied = copy_model("verb", model, "")
    assert torch.equal(copied.kept[0], model.kept[0])  # type: ignore[index]
    assert copied.kept[0].grad_fn is None  # type: ignore[index]
    assert model.kept[0].grad_fn is not None  # type: ignore[index]


def test_what_cannot_be_copied_is_named_with_the_remedy() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(StateError, match=r"^verb: Linear cannot be copied \(TypeError: .*lock.*\)\. Do this\.$"):
        copy_model("verb", model, "Do this.")
