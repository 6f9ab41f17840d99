"""Every norm is looked at, frozen ones too, and only those that were named are accused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import errors
from batchnorm.diagnosis.sites import EverySite, accused_by, frozen_norms
from batchnorm.errors import StateError, UnknownNameError
from batchnorm.nn.freeze import freeze


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.LazyBatchNorm1d())])
def test_models_without_a_norm_or_without_a_size_are_refused(model) -> None:
    with pytest.raises(errors.StateError, match="diagnose: "):
        batchnorm.diagnose(model, [torch.randn(4, 3)])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))


def test_norms_that_the_user_froze_are_looked_at_too() -> None:
    model = network()
    freeze(model, "1")
    model[2][0].eval()
    assert [site.name for site in EverySite(model).known] == ["1", "2.0"]
    assert frozen_norms(model) == {
        "1": "frozen by batchnorm.freeze",
        "2.0": "frozen by hand: in eval mode inside a model in train mode",
    }
    assert frozen_norms(model.eval()) == {"1": "frozen by batchnorm.freeze"}


def test_a_norm_that_keeps_no_statistics_is_no_reason_to_stop() -> None:
    assert EverySite(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))).known == []


def test_two_buffers_of_one_size_may_be_those_of_a_functional_norm() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("variance", torch.ones(3))

    assert EverySite(Functional()).known == []  # known once it runs


@pytest.mark.parametrize(
    ("names", "accused"),
    [
        (None, {"1", "2.0", "2", ""}),
        ("1", {"1"}),
        ("2", {"2", "2.0"}),
        (["1", "2.*"], {"1", "2.0"}),
        ("*", {"1", "2.0", "2", ""}),
    ],
)
def test_only_those_that_are_named_are_accused(names: Any, accused: set[str]) -> None:
    may_be = accused_by(network(), names)
    assert {name for name in ("", "1", "2", "2.0") if may_be(name)} == accused


def test_names_of_no_norm_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="'3'"):
        accused_by(network(), "3")
    with pytest.raises(StateError, match="names is empty"):
        accused_by(network(), [])
