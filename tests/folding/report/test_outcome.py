"""What a fold did, as lines, and when that is a change."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from batchnorm.folding.fold import fold
from batchnorm.folding.report.outcome import FoldOutcome, LeftNorm

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("norm", "line"), [
    (LeftNorm("bn", "conv", "It stays."), "bn → conv: not folded. It stays."),
    (LeftNorm("bn", None, "It stays."), "bn: not folded. It stays."),
    (LeftNorm("bn", None, "It stays.", "one multiply-add"), "bn: left, as one multiply-add. It stays."),
])  # fmt: skip
def test_a_norm_that_is_left_is_a_line(norm, line) -> None:
    assert str(norm) == line


def outcome(fuse: bool) -> FoldOutcome:
    return fold(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3)).eval(), X, fuse=fuse)


def test_a_multiply_add_is_a_change_and_a_norm_that_is_left_is_none() -> None:
    left, fused = outcome(False), outcome(True)
    assert (left.changed, left.costs.before == left.costs.after, left.on_random_inputs) == (False, True, None)
    assert (fused.changed, fused.folded, fused.on_random_inputs) == (True, [], True)


def test_it_is_not_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome(False).error = 1.0
