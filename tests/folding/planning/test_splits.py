"""The two parts of a norm's map: one after the other they are the map, and unusable statistics have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.removable_norm import NormState
from batchnorm.folding.planning.splits import norm_map, splits
from batchnorm.travel.maps import Map

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
STATE = NormState("running_mean", "running_var", "weight", "bias", 1e-5)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("scale", [vector(2, 0.5, 3), vector(2, -0.5, 3), vector(2, 0, 3), vector(1, 1, 1)])
@pytest.mark.parametrize("shift", [vector(1, -2, 0.5), vector(0, 0, 0)])
def test_the_parts_one_after_the_other_are_the_map(scale, shift) -> None:
    found = list(splits(Map(scale, shift), with_borders=False))
    for split in found:
        parts = [part for part in (split.before, split.after) if part is not None]
        whole = parts[0] if len(parts) == 1 else parts[0].then(parts[1])
        torch.testing.assert_close(whole.scale, scale)
        torch.testing.assert_close(whole.shift, shift)
    assert [(s.before is None, s.after is None) for s in found[:2]] == [(False, True), (True, False)]
    cut = [split for split in found if split.before is not None and split.after is not None]
    only_one = not bool(shift.any()) or bool((scale == 1).all())
    assert len(cut) == (0 if only_one else 1 + int((scale != 0).all()) * (1 + int((scale < 0).any())))


def test_all_splits_come_once_more_with_borders_where_those_are_allowed() -> None:
    map_ = Map(vector(2, -1), vector(1, 1))
    allowed = [split.with_borders for split in splits(map_, with_borders=True)]
    assert allowed == [False] * (len(allowed) // 2) + [True] * (len(allowed) // 2)
    assert not any(split.with_borders for split in splits(map_, with_borders=False))


def norm() -> nn.BatchNorm1d:
    bn = nn.BatchNorm1d(3).eval()
    bn.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    bn.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    return bn


def test_the_map_is_what_the_norm_computes() -> None:
    bn = norm()
    map_ = norm_map(Parameters.of(bn, trace(bn, X)), STATE)
    torch.testing.assert_close(X.double() * map_.scale + map_.shift, bn(X).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "value", "said"), [
    ("running_mean", float("nan"), "Its running_mean is not finite"),
    ("weight", float("inf"), "Its weight is not finite"),
    ("running_var", -1.0, r"Its running_var is negative \(-1\)"),
])  # fmt: skip
def test_unusable_statistics_are_refused(name, value, said) -> None:
    bn = norm()
    getattr(bn, name).data[1] = value
    with pytest.raises(Refusal, match=said):
        norm_map(Parameters.of(bn, trace(bn, X)), STATE)


def test_a_division_by_zero_is_refused() -> None:
    bn = norm()
    bn.running_var[1] = 0.0
    with pytest.raises(Refusal, match="both 0, so it divides by zero"):
        norm_map(Parameters.of(bn, trace(bn, X)), NormState("running_mean", "running_var", None, None, 0.0))
