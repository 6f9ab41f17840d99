"""The layer that is built from an operator's arguments computes what the operator does."""

import pytest
import torch
from tests.folding.lively_models import randn

from batchnorm.absorbers.table import ABSORBERS
from batchnorm.dataflow.refusal import Refusal
from batchnorm.nn.operators import named_arguments

aten = torch.ops.aten
X1, X2, X3 = randn(2, 4, 9), randn(2, 4, 7, 8), randn(2, 4, 5, 6, 4)
CALLS = [
    (aten.conv1d.default, (X1, randn(6, 2, 3), randn(6), [2], [1], [2], 2)),
    (aten.conv1d.padding, (X1, randn(6, 4, 3), None, [1], "same", [2])),
    (aten.conv2d.default, (X2, randn(6, 4, 3, 2), randn(6), [2], [1, 0])),
    (aten.conv2d.padding, (X2, randn(6, 4, 3, 3), randn(6), [1, 1], "valid")),
    (aten.conv3d.default, (X3, randn(4, 1, 2, 2, 2), None, [1], [1], [1], 4)),
    (aten.conv_transpose1d.default, (X1, randn(4, 3, 3), randn(6), [2], [1], [1], 2)),
    (aten.conv_transpose2d.input, (X2, randn(4, 6, 3, 3), None, [2, 3], [1], [1, 0], 1, [1])),
    (aten.conv_transpose3d.input, (X3, randn(4, 2, 2, 2, 2), randn(2))),
    (aten.linear.default, (randn(2, 5, 4), randn(6, 4), randn(6))),
    (aten.linear.default, (randn(2, 4), randn(6, 4))),
    (aten.embedding.default, (randn(7, 3), torch.tensor([[1, 0], [6, 2]]), 2)),
    (aten.batch_norm.default, (X3, randn(4), None, randn(4), randn(4).square(), False, 0.1, 1e-3, True)),
    (aten.batch_norm.default, (randn(5, 4), None, None, randn(4), randn(4).square(), False, 0.1, 1e-3, True)),
]


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_every_layer(op, args):
    row, named = ABSORBERS[op._schema.name], named_arguments(op, args, {})
    layer = row.layer(named)
    read = named[row.reads]
    torch.testing.assert_close(layer(read), op(*args), rtol=0, atol=0)
    assert not layer.training
    assert all(p.data_ptr() not in {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
               for p in layer.parameters())  # fmt: skip


def test_every_kind_is_tried():
    assert {op._schema.name for op, _ in CALLS} == set(ABSORBERS)


def test_what_no_layer_computes():
    with pytest.raises(Refusal, match="batch mode"):
        ABSORBERS["aten::batch_norm"].layer({"running_mean": None, "running_var": None, "training": True})
    with pytest.raises(Refusal, match="1 dimensions"):
        ABSORBERS["aten::linear"].layer({"weight": randn(4), "bias": None})
