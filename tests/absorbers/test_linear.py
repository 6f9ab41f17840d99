"""A product with a constant matrix is a linear layer, in all forms in which programs write it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from batchnorm.absorbers.linear import Linear

aten = torch.ops.aten
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
W, B = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.randn(3)


def constant(given):
    return given if given is W or given is B else None


@pytest.mark.parametrize(("target", "args", "kwargs"), [
    (aten.mm.default, (X, W), {}),
    (aten.matmul.default, (X, W), {}),
    (aten.addmm.default, (B, X, W), {}),
])  # fmt: skip
def test_products_with_a_constant_matrix(target, args, kwargs):
    found = Linear().arguments(target, args, kwargs, constant)
    torch.testing.assert_close(F.linear(found["input"], found["weight"], found["bias"]), target(*args, **kwargs))


@pytest.mark.parametrize(("target", "args", "kwargs"), [
    (aten.mm.default, (W, X.t()[:3]), {}),  # of two computed matrices
    (aten.addmm.default, (B, X, W), {"alpha": 2}),
    (aten.addmm.default, (torch.ones(2, 3), X, W), {}),  # adds another value to each row
    (aten.add.Tensor, (X, W), {}),
])  # fmt: skip
def test_what_is_none(target, args, kwargs):
    assert Linear().arguments(target, args, kwargs, constant) is None
