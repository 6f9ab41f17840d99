from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.functional import batch_norm, use_backend
from batchnorm.functional.operator import SCHEMA, batch_norm_operator

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) > 0.3


class Seen(TorchDispatchMode):
    """Notes every operator and its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def state():
    return {
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.full((3,), 2.0),
        "bias": torch.ones(3),
    }


def test_the_schema_is_the_documented_one():
    assert str(batch_norm_operator._schema) == f"batchnorm::{SCHEMA}"


@pytest.mark.parametrize("forced", [False, True])
def test_a_mode_below_autograd_sees_one_whole_operator_with_the_very_tensors(forced):
    given, seen = state(), Seen()
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), seen:
        if forced:
            with use_backend("reference"):
                y = batch_norm(X, **given, training=True, activation="relu")
        else:
            y = batch_norm(X, **given, training=True, mask=MASK)
    assert len(seen.calls) == 1 or not forced  # with a mask, its valid positions are counted besides
    calls = [args for func, args in seen.calls if func is batch_norm_operator]
    assert len(calls) == 1
    assert calls[0][0] is X
    for tensor, name in zip(calls[0][1:5], ("running_mean", "running_var", "weight", "bias"), strict=True):
        assert tensor is given[name]
    assert not any(func is torch.ops.aten.rsqrt.default for func, _ in seen.calls)
    fresh = state()
    with use_backend("reference"):
        extras = {"activation": "relu"} if forced else {"mask": MASK}
        assert torch.equal(y, batch_norm(X, **fresh, training=True, **extras))
    assert torch.equal(given["running_var"], fresh["running_var"])


def test_the_plain_call_is_torchs_own_operator():
    seen, given = Seen(), state()
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), seen:
        batch_norm(X, **given, activation="relu")
    assert [func for func, _ in seen.calls] == [torch.ops.aten.batch_norm.default, torch.ops.aten.relu.default]


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_a_graph_break_and_with_the_same_numbers(training):
    def run(function):
        given, x = state(), X.clone().requires_grad_()
        y = function(x, given["running_mean"], given["running_var"], given["weight"], MASK)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return y, gradient, given["running_mean"], given["running_var"]

    def function(x, mean, var, weight, mask):
        return batch_norm(x, mean, var, weight, training=training, activation="silu", mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(function), strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(torch.float32).eps, atol=torch.finfo(torch.float32).eps)


def test_compiled_code_follows_a_change_of_backend():
    seen = []

    def look(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(lambda x: batch_norm(x, None, None, training=True), fullgraph=True, backend=look)
    compiled(X)
    with use_backend("reference"):
        compiled(X)
    compiled(X)
    assert seen == [[torch.nn.functional.batch_norm], [batch_norm_operator]]


def test_it_runs_on_meta_tensors():
    x = torch.empty(4, 3, 5, device="meta")
    y = batch_norm(x, None, None, training=True, mask=torch.ones(4, 5, dtype=torch.bool, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == x.shape
