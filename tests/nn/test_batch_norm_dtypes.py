"""Running statistics stay in float32 where a layer becomes half, and the layer goes on as in torch's mixed mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import batchnorm
from batchnorm.functional import use_backend
from batchnorm.nn import BatchNorm1d, BatchNorm2d

HALVES = [torch.float16, torch.bfloat16]
CASTS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to half": (lambda m: m.to(torch.float16), torch.float16),
    "to like": (lambda m: m.to(torch.empty(0, dtype=torch.bfloat16)), torch.bfloat16),
}


def layer(kind=BatchNorm1d):
    norm = kind(3)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.1, 1e-7, 70000.0]))
        norm.running_var.copy_(torch.tensor([1e-9, 2.0, 1 / 3]))
        norm.weight.copy_(torch.tensor([0.5, 1.5, 2.0]))
    return norm


@pytest.mark.parametrize("cast", list(CASTS))
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_keep_dtype_and_bits(frozen, cast):
    norm = layer()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    if frozen:
        batchnorm.freeze(norm)
    function, dtype = CASTS[cast]
    assert function(torch.nn.Sequential(norm))[0] is norm
    assert norm.weight.dtype == norm.bias.dtype == dtype
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, var)


def test_wider_casts_are_torchs():
    norm = layer().double()
    assert norm.running_mean.dtype == norm.weight.dtype == torch.float64
    norm.half()
    assert norm.running_var.dtype == torch.float32
    norm.float()
    assert norm.running_mean.dtype == norm.weight.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "native", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_data_is_normalized_as_in_torchs_mixed_mode(dtype, wide, training, backend):
    norm = BatchNorm2d(3).train(training).to(dtype)
    if wide:
        norm.float()
    x = torch.randn(4, 3, 5, 5).to(dtype).requires_grad_()
    mean, var = torch.zeros(3), torch.ones(3)
    with use_backend(backend):
        y = norm(x)
    z = F.batch_norm(x, mean, var, norm.weight.float(), norm.bias.float(), training)
    # one rounding of the output each, in its last place
    torch.testing.assert_close(y, z, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-6, atol=1e-7)
    y.float().sum().backward()
    assert norm.weight.grad.dtype == norm.weight.dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_large_and_fused(dtype):
    norm, twin = BatchNorm2d(4).to(dtype), BatchNorm2d(4).to(dtype)
    norm.fused = True
    x = torch.randn(16, 4, 64, 64).to(dtype)
    y = torch.relu(norm(x))
    assert torch.equal(y, torch.relu(twin(x)))
    assert torch.equal(norm.running_var, twin.running_var)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_both_ways(assign):
    torchs, ours = torch.nn.BatchNorm1d(3), layer().half()
    torchs.half()
    torchs.load_state_dict(ours.state_dict())
    assert torch.equal(torchs.running_var, ours.running_var.half())
    fresh = BatchNorm1d(3).half()
    fresh.load_state_dict(torchs.state_dict(), assign=assign)
    assert fresh.running_mean.dtype == fresh.running_var.dtype == torch.float32
    assert torch.equal(fresh.running_var, torchs.running_var.float())


def test_a_converted_half_model_and_the_way_back():
    x = torch.randn(8, 3).half()
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).half().eval()
    expected = copy.deepcopy(model)(x)
    batchnorm.convert(model, inplace=True)
    assert torch.equal(model(x), expected)
    model.half()  # from here on in float32
    assert model[0].running_mean.dtype == torch.float32
    torch.testing.assert_close(model(x), expected)
    batchnorm.revert(model, inplace=True)
    assert model[0].running_mean.dtype == torch.float16
    assert torch.equal(model(x), expected)


def test_moves_copies_and_meta_tensors():
    norm = layer().half()
    for made in (copy.deepcopy(norm), norm.share_memory()):
        assert made.running_mean.dtype == torch.float32
    empty = norm.to("meta").half().to_empty(device="cpu")
    assert (empty.running_mean.dtype, empty.weight.dtype) == (torch.float32, torch.float16)
