"""Every operator that normalizes a batch is recognized, run on given statistics, and kept from its buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm.functional  # noqa: F401 - registers the library's own operator
from batchnorm.statistics.operators import NormCall

aten = torch.ops.aten


def arguments() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 3, 5), torch.rand(3) + 0.5, torch.randn(3)
    return x, weight, bias, torch.randn(3), torch.rand(3) + 0.5


def calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    x, w, b, mean, var = arguments()
    return {
        "batch_norm": (aten.batch_norm.default, (x, w, b, mean, var, True, 0.1, 1e-5, True), {}),
        "by keyword": (
            aten.native_batch_norm.default,
            (x, w, b),
            {"running_mean": mean, "running_var": var, "training": True, "momentum": 0.1, "eps": 1e-5},
        ),
        "native": (aten.native_batch_norm.default, (x, w, b, mean, var, True, 0.1, 1e-5), {}),
        "legit": (aten._native_batch_norm_legit.default, (x, w, b, mean, var, True, 0.1, 1e-5), {}),
        "functional": (aten._native_batch_norm_legit_functional.default, (x, w, b, mean, var, True, 0.1, 1e-5), {}),
        "no_training": (aten._native_batch_norm_legit_no_training.default, (x, w, b, mean, var, 0.1, 1e-5), {}),
        "impl_index": (aten._batch_norm_impl_index.default, (x, w, b, mean, var, True, 0.1, 1e-5, True), {}),
        "no_update": (aten._batch_norm_no_update.default, (x, w, b, mean, var, 0.1, 1e-5), {}),
        "with_update": (aten._batch_norm_with_update.default, (x, w, b, mean, var, 0.1, 1e-5), {}),
        "ours": (
            torch.ops.batchnorm.batch_norm.default,
            (x, mean, var, w, b, True, 0.1, 1e-5, None, None, None, "reference"),
            {},
        ),
    }


def first(result: Any) -> Tensor:
    tensor = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(tensor, Tensor)
    return tensor


@pytest.mark.parametrize("name", calls())
def test_the_call_is_read_by_name(name: str) -> None:
    func, args, kwargs = calls()[name]
    call = NormCall.of(func, args, kwargs)
    x, _, _, mean, var = arguments()
    assert call is not None
    assert torch.equal(call.input, x)
    assert call.running_mean is not None
    assert call.running_var is not None
    assert torch.equal(call.running_mean, mean)
    assert torch.equal(call.running_var, var)
    assert call.eps == 1e-5
    assert call.mask is None


@pytest.mark.parametrize("name", calls())
def test_running_a_call_never_writes_to_its_statistics(name: str) -> None:
    func, args, kwargs = calls()[name]
    call = NormCall.of(func, args, kwargs)
    assert call is not None
    assert call.running_mean is not None
    assert call.running_var is not None
    mean, var = call.running_mean.clone(), call.running_var.clone()
    with torch.no_grad():
        result = first(call.run())
        assert torch.equal(call.running_mean, mean)
        assert torch.equal(call.running_var, var)
        assert torch.equal(result, first(func(*args, **kwargs)))


@pytest.mark.parametrize("name", sorted(set(calls()) - {"with_update"}))
def test_running_on_statistics_is_eval_mode_on_them(name: str) -> None:
    func, args, kwargs = calls()[name]
    call = NormCall.of(func, args, kwargs)
    assert call is not None
    x, w, b, *_ = arguments()
    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.5, 2.5])
    with torch.no_grad():
        result = first(call.run_on(mean, var))
    expected = torch.nn.functional.batch_norm(x.double(), mean.double(), var.double(), w.double(), b.double())
    # a handful of float32 operations on values below 10
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=10 * 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_follow_the_statistics(dtype: torch.dtype) -> None:
    x, w, b, mean, var = (t.to(dtype) for t in arguments())
    call = NormCall.of(aten.batch_norm.default, (x, w, b, mean, var, False, 0.1, 1e-5, True), {})
    assert call is not None
    assert first(call.run_on(mean.float(), var.float())).dtype == dtype


def test_other_operators_are_none() -> None:
    x = torch.randn(2, 3)
    assert NormCall.of(aten.relu.default, (x,), {}) is None
    assert NormCall.of(aten._native_batch_norm_legit.no_stats, (x, None, None, True, 0.1, 1e-5), {}) is None
