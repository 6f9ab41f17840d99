"""What matters of an operator, by its name alone."""

from __future__ import annotations

import pytest
import torch

import batchnorm.functional  # noqa: F401 - registers our operators
from batchnorm.monitor.operator_traits import OperatorTraits, traits_of

ATEN = torch.ops.aten


@pytest.mark.parametrize(
    ("func", "expected"),
    [
        (ATEN.native_batch_norm.default, OperatorTraits("native_batch_norm", True, 1, False)),
        (ATEN._native_batch_norm_legit_no_training.default, None),
        (ATEN.convolution.default, OperatorTraits("convolution", False, 1, False)),
        (ATEN.native_group_norm.default, OperatorTraits("native_group_norm", False, 1, False)),
        (ATEN.addmm.default, OperatorTraits("addmm", False, -1, False)),
        (ATEN.embedding.default, OperatorTraits("embedding", False, -1, False)),
        (ATEN.native_layer_norm.default, OperatorTraits("native_layer_norm", False, -1, False)),
        (ATEN.relu.default, OperatorTraits("relu", False, None, True)),
        (ATEN.relu_.default, OperatorTraits("relu", False, None, True)),  # in place
        (ATEN.clamp_min.Tensor, OperatorTraits("clamp_min", False, None, True)),
    ],
)
def test_norms_layers_and_activations(func: object, expected: OperatorTraits | None) -> None:
    found = traits_of(func)
    if expected is None:
        assert found is not None
        assert (found.is_norm, found.unit_dim) == (True, 1)
    else:
        assert found == expected


@pytest.mark.parametrize("func", [ATEN.add.Tensor, ATEN.mean.dim, ATEN.view.default, torch.relu, print])
def test_of_others_nothing_matters(func: object) -> None:
    assert traits_of(func) is None


def test_our_own_operators_place_units_and_are_no_norm_of_torchs() -> None:
    ours = [getattr(torch.ops.batchnorm, name) for name in dir(torch.ops.batchnorm) if not name.startswith("_")]
    found = [traits_of(packet.default) for packet in ours if hasattr(packet, "default")]
    known = [traits for traits in found if traits is not None]
    assert known
    assert all(not traits.is_norm and not traits.may_activate for traits in known)
    assert any(traits.unit_dim == 1 for traits in known)
