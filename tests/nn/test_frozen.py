"""A frozen norm is one by its class: what it remembers, refuses, and takes along into copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from batchnorm.errors import StateError
from batchnorm.nn.frozen import THAWED, FrozenParts, move, state_of, thawed_class

STATISTICS, AFFINE = FrozenParts(statistics=True, affine=False), FrozenParts(statistics=False, affine=True)


def frozen(parts: FrozenParts, norm: nn.Module | None = None) -> nn.Module:
    norm = nn.BatchNorm1d(3) if norm is None else norm
    move([norm], [parts])
    return norm


def test_frozen_statistics_ignore_train_and_thaw_into_the_mode_last_asked_for() -> None:
    for asked in (True, False):
        norm = frozen(STATISTICS)
        norm.train()
        norm.train(asked)
        assert not norm.training
        assert state_of(norm) == STATISTICS
        move([norm], [THAWED])
        assert (norm.training, type(norm), state_of(norm)) == (asked, nn.BatchNorm1d, THAWED)


def test_frozen_parameters_get_their_own_flags_back_and_lose_their_gradients() -> None:
    norm = nn.BatchNorm1d(3)
    norm.bias.requires_grad_(False)
    norm.weight.grad = torch.ones(3)
    frozen(AFFINE, norm)
    assert norm.training
    assert (norm.weight.requires_grad, norm.weight.grad) == (False, None)
    move([norm], [THAWED])
    assert (norm.weight.requires_grad, norm.bias.requires_grad) == (True, False)


def test_norms_that_share_a_parameter_get_the_flag_that_it_had() -> None:
    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    two.weight = one.weight
    move([one, two], [AFFINE, AFFINE])
    move([one, two], [THAWED, THAWED])
    assert one.weight.requires_grad


def test_frozen_statistics_cannot_be_taken_away() -> None:
    norm = frozen(STATISTICS)
    with pytest.raises(StateError, match=r"running_mean = None would take them away.*batchnorm\.unfreeze"):
        norm.running_mean = None
    frozen(AFFINE, norm)
    norm.running_mean = None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))])
def test_copies_and_pickles_are_frozen_and_of_the_same_class(duplicate) -> None:
    norm = frozen(STATISTICS)
    twin = duplicate(norm)
    assert type(twin) is type(norm)
    assert state_of(twin) == STATISTICS
    move([norm], [THAWED])
    assert state_of(twin) == STATISTICS


def test_the_class_says_what_it_is_of_and_shows_what_is_frozen() -> None:
    norm = frozen(FrozenParts(statistics=True, affine=True))
    assert isinstance(norm, nn.BatchNorm1d)
    assert thawed_class(type(norm)) is nn.BatchNorm1d is thawed_class(nn.BatchNorm1d)
    assert repr(norm).startswith("FrozenBatchNorm1d(3, ")
    assert "frozen=statistics and affine" in repr(norm)
    assert state_of(nn.Linear(1, 1)) == THAWED
