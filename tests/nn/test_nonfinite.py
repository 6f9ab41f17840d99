"""What is not finite is kept out of a layer's statistics, counted, and named."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm
from batchnorm.errors import ArgumentTypeError, StateError
from batchnorm.functional import use_backend
from batchnorm.nn import BatchNorm1d, BatchNorm2d

BACKENDS = ["torch", "native", "reference"]


def broken(dtype=torch.float32, bad=float("inf")):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1] = bad
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_channel_keeps_its_statistics_bit_for_bit(backend, bad, dtype):
    layer = BatchNorm1d(3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    layer.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    with use_backend(backend):
        y = layer(broken(dtype, bad))
        assert y[:, 1].isnan().any()
        assert torch.equal(layer.running_mean[1], mean[1])
        assert torch.equal(layer.running_var[1], var[1])
        assert not torch.equal(layer.running_mean[::2], mean[::2])
        assert batchnorm.nonfinite_batches(layer) == {"": 1}
        assert layer.num_batches_tracked == 0
        layer(broken(dtype, 0.0))
    assert layer.running_mean.isfinite().all()
    assert layer.num_batches_tracked == 1
    assert batchnorm.nonfinite_batches(layer) == {"": 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variance_beyond_float32_does_not_enter(backend):
    layer = BatchNorm1d(1)
    with use_backend(backend):
        layer(torch.tensor([[3e30], [-3e30]]))
    assert layer.running_var.item() == 1
    assert batchnorm.nonfinite_batches(layer) == {"": 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cumulative_average_is_that_of_the_batches_that_entered(backend):
    layer, expected = BatchNorm1d(3, momentum=None), torch.nn.BatchNorm1d(3, momentum=None)
    good = [torch.randn(6, 3), torch.randn(6, 3)]
    with use_backend(backend):
        for x in (torch.full((6, 3), float("nan")), good[0], torch.full((6, 3), float("inf")), good[1]):
            layer(x)
    for x in good:
        expected(x)
    torch.testing.assert_close(layer.running_mean, expected.running_mean)
    torch.testing.assert_close(layer.running_var, expected.running_var)


@pytest.mark.parametrize("size", [(4, 3, 4, 4), (16, 3, 32, 32)])
def test_fused_layers_count_too(size):
    layer = BatchNorm2d(3)
    layer.fused = True
    x = torch.randn(size)
    x[0, 2, 0, 0] = float("nan")
    torch.relu(layer(x))
    assert batchnorm.nonfinite_batches(layer) == {"": 1}
    assert layer.running_var[2] == 1


def test_masked_positions_do_not_count():
    layer, x = BatchNorm1d(3), broken()
    layer(x, mask=x.isfinite())
    assert batchnorm.nonfinite_batches(layer) == {}


def test_layers_are_named_and_the_state_dict_is_torchs():
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(BatchNorm1d(3)), "b": BatchNorm1d(3)})
    model["b"](torch.randn(6, 3))
    for _ in range(2):
        model["a"](broken())
    assert batchnorm.nonfinite_batches(model) == {"a.0": 2}
    assert list(BatchNorm1d(3).state_dict()) == list(torch.nn.BatchNorm1d(3).state_dict())
    assert [n for n, _ in BatchNorm1d(3).named_buffers()] == [n for n, _ in torch.nn.BatchNorm1d(3).named_buffers()]


def test_copies_pickles_and_moves_keep_the_count():
    layer = BatchNorm1d(3)
    layer(broken())
    copied = copy.deepcopy(layer)
    for made in (copied, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double(), layer.half()):
        assert batchnorm.nonfinite_batches(made) == {"": 1}
    copied(broken())
    assert batchnorm.nonfinite_batches(layer) == {"": 1}


def test_pickles_from_before_there_was_a_count():
    layer = BatchNorm1d(3)
    del layer.__dict__["_refused"]
    old = pickle.loads(pickle.dumps(layer))
    assert batchnorm.nonfinite_batches(old) == {}
    old(broken())
    assert batchnorm.nonfinite_batches(old) == {"": 1}


def test_meta_and_empty_layers_begin_at_zero():
    layer = BatchNorm1d(3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    layer.reset_running_stats()
    layer(broken())
    assert batchnorm.nonfinite_batches(layer) == {"": 1}
    layer.to("meta")
    assert layer.running_mean.is_meta


def test_fake_tensors_are_not_counted_in_a_real_counter():
    layer = BatchNorm1d(3)
    with FakeTensorMode() as mode:
        state = {k: mode.from_tensor(v) for k, v in layer.state_dict(keep_vars=True).items()}
        torch.func.functional_call(layer, state, (torch.randn(6, 3),))
    assert batchnorm.nonfinite_batches(layer) == {}
    layer(broken())
    assert batchnorm.nonfinite_batches(layer) == {"": 1}


def test_shared_memory_shares_the_count():
    layer = BatchNorm1d(3).share_memory()
    assert layer._refused.is_shared()
    layer(broken())
    assert batchnorm.nonfinite_batches(layer) == {"": 1}


def test_converted_layers_count_and_reverted_ones_keep_nothing():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    attributes = set(model[0].__dict__)
    batchnorm.convert(model, inplace=True)
    model(broken())
    assert batchnorm.nonfinite_batches(model) == {"0": 1}
    batchnorm.revert(model, inplace=True)
    assert set(model[0].__dict__) == attributes


@pytest.mark.parametrize(
    ("size", "backend"),
    [
        ((6, 3), "aot_eager"),
        ((40000, 3), "aot_eager"),
        ((40000, 3), "inductor"),
        *(pytest.param(*case, marks=pytest.mark.sweep) for case in (((6, 3), "eager"), ((40000, 3), "eager"))),
        pytest.param((6, 3), "inductor", marks=pytest.mark.sweep),
    ],
)
def test_compiled_layers_are_safe_and_count(size, backend):
    layer, x = BatchNorm1d(3), torch.randn(size)
    x[0, 1] = float("inf")
    torch.compile(layer, backend=backend)(x)
    assert layer.running_var.isfinite().all()
    assert layer.running_mean[1] == 0
    assert (layer.num_batches_tracked, layer._refused) == (0, 1)


def test_an_ensemble_under_vmap_is_safe():
    layers = [BatchNorm1d(3) for _ in range(2)]
    params, buffers = torch.func.stack_module_state(layers)
    x = torch.stack((broken(), broken(bad=0.0)))

    def call(p, b, h):
        return torch.func.functional_call(layers[0], (p, b), (h,))

    torch.func.vmap(call)(params, buffers, x)
    assert buffers["running_mean"].isfinite().all()
    assert buffers["running_mean"][0, 1] == 0
    assert buffers["running_mean"][1, 1] != 0


def test_what_has_no_layer_of_ours_is_refused():
    with pytest.raises(StateError, match=r"Sequential holds no layer of this library.*batchnorm.convert"):
        batchnorm.nonfinite_batches(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    with pytest.raises(ArgumentTypeError, match="got int"):
        batchnorm.nonfinite_batches(3)
