"""Torch's kernel under this library's keeping of running statistics: torch's numbers, and what torch gets wrong."""

from __future__ import annotations

import copy
from collections import Counter as Names

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.functional import batch_norm, use_backend
from batchnorm.kernels.contract import Counters
from batchnorm.kernels.torch_backend import TORCH
from batchnorm.nn import BatchNorm1d, BatchNorm2d

SHAPE = (6, 3, 4)


class Quiet(TorchDispatchMode):
    """A mode that looks at nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def served_by_torch(*call):
    """Return what torch's kernel gives, for the arguments of batch_norm and counters."""
    *call, counters = call
    return TORCH.serve((*call, None, None, False), counters, False)


def state(dtype=torch.float32):
    return torch.full((3,), 0.25, dtype=dtype), torch.full((3,), 0.75, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_numbers_and_steps_are_torchs_to_the_last_bit(training, watched, dtype):
    x = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    params = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for function in (F.batch_norm, lambda *a: served_by_torch(*a, Counters())):
        h, w, (mean, var) = x.clone().requires_grad_(), torch.ones(3, dtype=params).requires_grad_(), state(params)
        with Quiet() if watched and function is not F.batch_norm else torch.enable_grad():
            y = function(h, mean, var, w, None, training, 0.1, 1e-5)
        y.sin().sum().backward()
        results.append((y, h.grad, w.grad, mean, var))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_only_the_broken_channel_keeps_its_statistics(watched, bad):
    x = torch.randn(SHAPE)
    x[2, 1, 0] = bad
    c, (mean, var) = Counters(torch.tensor(0), torch.tensor(0)), state()
    good_mean, good_var = state()
    F.batch_norm(x, good_mean, good_var, training=True)
    with Quiet() if watched else torch.no_grad():
        y = served_by_torch(x, mean, var, None, None, True, 0.1, 1e-5, c)
    assert y[:, 1].isnan().all()
    assert (mean[1], var[1]) == (0.25, 0.75)
    assert torch.equal(mean[::2], good_mean[::2])
    assert torch.equal(var[::2], good_var[::2])
    assert (c.batches, c.refused) == (0, 1)


def test_torchs_own_is_silently_wrong_after_a_step_between_forward_and_backward():
    """Why evaluation is given copies: should torch count its writes one day, this tells."""
    x, (mean, var) = torch.randn(SHAPE).requires_grad_(), state()
    y = F.batch_norm(x, mean, var, training=False)
    (right,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    F.batch_norm(torch.randn(SHAPE) * 9, mean, var, training=True)
    (wrong,) = torch.autograd.grad(y.sum(), x)
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("between", ["torch", "reference", "native", "copy_"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", ["torch", "reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backward_pass_finds_the_statistics_of_its_forward(dtype, first, training, between):
    x, w = torch.randn(SHAPE, dtype=dtype).requires_grad_(), torch.ones(3, dtype=dtype).requires_grad_()
    mean, var = state(dtype)
    with use_backend(first):
        y = batch_norm(x, mean, var, w, training=training).square().sum()
    right = torch.autograd.grad(y, (x, w), retain_graph=True)
    if between == "copy_":  # as DistributedDataParallel does before each forward
        mean.copy_(torch.ones(3))
        var.copy_(torch.ones(3) * 9)
    else:
        with use_backend(between):
            batch_norm(torch.randn(SHAPE, dtype=dtype) * 9, mean, var, training=True)
    got = torch.autograd.grad(y, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(right, got, strict=True))


def test_a_refused_call_leaves_no_trace():
    mean, var = state()
    with pytest.raises(ValueError, match="2 values per channel"):
        batch_norm(torch.randn(1, 3), mean, var, training=True)
    assert torch.equal(torch.stack((mean, var)), torch.stack(state()))


def test_an_exported_training_program_holds_torchs_operator_alone():
    from batchnorm.nn import BatchNorm1d

    program = torch.export.export(BatchNorm1d(3).train(), (torch.randn(SHAPE),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sorted(targets) == ["aten.add_.Tensor", "aten.batch_norm.default"]


def test_half_parameters_beside_float32_statistics_are_torchs_mixed_mode():
    for dtype in (torch.float16, torch.bfloat16):
        for training in (True, False):
            for backend in ("torch", "native", "reference"):
                x, (mean, var), (m, v) = torch.randn(SHAPE).to(dtype), state(), state()
                w = torch.tensor([0.5, 1.0, 2.0], dtype=dtype).requires_grad_()
                wide = w.detach().float().requires_grad_()
                with use_backend(backend):
                    y = batch_norm(x, mean, var, w, training=training)
                    z = batch_norm(x, m, v, wide, training=training)
                y.float().sin().sum().backward()
                z.float().sin().sum().backward()
                assert torch.equal(y, z)
                assert torch.equal(torch.stack((mean, var)), torch.stack((m, v)))
                assert w.grad.dtype == dtype
                assert torch.equal(w.grad, wide.grad.to(dtype))


# -- digits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4096, 64), (256, 64), (3, 5), (16, 8, 4, 4)])
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4, -1e6])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("alone", [True, False], ids=["one channel", "all channels"])
@pytest.mark.parametrize("native", [True, False])
def test_small_batches_keep_their_digits(shape, mean, tracked, alone, native, monkeypatch):
    """The bound is the contract's, with torch's 25 units for the variance of channels near 0."""
    if not native:
        monkeypatch.setattr("batchnorm.kernels.torch_backend._at_once", None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x[:, -1 if alone else slice(None)] += mean
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    layer = BatchNorm1d if x.dim() == 2 else BatchNorm2d
    layer = layer(shape[1], momentum=0.3, track_running_stats=tracked)
    y = layer(x.requires_grad_())
    exact = x.detach().double()
    dims = [0, *range(2, x.dim())]
    of_batch = exact.var(dims)
    rstd = (exact.var(dims, correction=0) + layer.eps).rsqrt()
    column = lambda v: v.reshape(1, -1, *(1,) * (x.dim() - 2))  # noqa: E731
    torch.testing.assert_close(
        y.detach().double(), (exact - column(exact.mean(dims))) * column(rstd), rtol=1e-5, atol=1e-5
    )
    if tracked:
        torch.testing.assert_close(layer.running_var.double(), 0.7 + 0.3 * of_batch, rtol=5e-6, atol=0)
        assert layer.num_batches_tracked == 1
    y.sum().backward()


def test_a_forced_backend_is_taken_whatever_it_loses():
    x = torch.randn(4096, 8) + 1e6
    with use_backend("torch"):
        y = BatchNorm1d(8)(x)
    assert torch.equal(y, nn.BatchNorm1d(8)(x))


def test_what_is_not_finite_is_left_to_the_rule_for_that():
    layer = BatchNorm1d(2)
    x = torch.randn(16, 2)
    x[3, 1] = float("inf")
    layer(x)
    assert layer.running_mean[1] == 0
    assert layer.num_batches_tracked == 0


# -- operators ---------------------------------------------------------------------------------------------------------

WITHOUT_A_KERNEL = ("aten.detach.", "aten.empty.", "aten.empty_like.")
"""Operators that make a view or take memory, and start nothing on a device."""


class Counting(TorchDispatchMode):
    """Notes the operators that would start a kernel."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith(WITHOUT_A_KERNEL):
            self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def operators_of(layer, *, learns=True):
    """Return the operators of a step on an accelerator: forward, statistics and, if it learns, backward."""
    layer = layer.to("meta")
    x = torch.empty(2, 8, 4, 4, device="meta", requires_grad=learns)
    layer(x)  # the first call makes what the layer keeps
    with Counting() as mode, torch.set_grad_enabled(learns):
        y = layer(x)
        if learns:
            y.backward(torch.empty_like(y))
    return mode.operators


def test_without_the_guard_a_step_on_an_accelerator_is_torchs_operator_for_operator():
    torchs = operators_of(nn.BatchNorm2d(8))
    assert len(torchs) == 3
    assert sorted(operators_of(BatchNorm2d(8, skip_nonfinite=False))) == sorted(torchs)
    converted = batchnorm.convert(nn.Sequential(nn.BatchNorm2d(8)), skip_nonfinite=False).model
    assert sorted(operators_of(converted)) == sorted(torchs)


def test_the_guard_costs_ten_operators_on_an_accelerator():
    ours, torchs = operators_of(BatchNorm2d(8)), operators_of(nn.BatchNorm2d(8))
    more = ["clone"] * 2 + ["mul"] * 2 + ["eq"] + ["where"] * 2 + ["all", "bitwise_not", "add_"]
    assert sorted(name.split(".")[1] for name in ours) == sorted([name.split(".")[1] for name in torchs] + more)


@pytest.mark.parametrize(
    ("settings", "training", "clones"),
    [({"skip_nonfinite": False}, True, 0), ({}, True, 2), ({}, False, 2)],
    ids=["training without guard", "training", "evaluation"],
)
def test_where_nobody_watches_there_are_no_more_operators_than_that(settings, training, clones):
    """Counted by the profiler: under a dispatch mode evaluation reads the buffers, elsewhere copies where it learns."""
    profiles = []
    for layer in (BatchNorm2d(8, device="meta", **settings), nn.BatchNorm2d(8, device="meta")):
        layer.train(training)
        x = torch.empty(2, 8, 4, 4, device="meta", requires_grad=True)
        layer(x)
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            y = layer(x)
        y.backward(torch.empty_like(y))
        profiles.append(Names(e.name for e in profile.function_events if e.name.startswith("aten::")))
    more = profiles[0] - profiles[1]
    assert not profiles[1] - profiles[0]
    assert more["aten::clone"] == clones
    assert clones or not more


@pytest.mark.parametrize("learns", [False, True])
def test_a_watched_evaluation_is_torchs_operator_for_operator(learns):
    assert operators_of(BatchNorm2d(8).eval(), learns=learns) == operators_of(nn.BatchNorm2d(8).eval(), learns=learns)


def test_the_option_is_seen_kept_and_taken_back():
    layer = BatchNorm2d(8, skip_nonfinite=False)
    assert "skip_nonfinite=False" in repr(layer)
    assert copy.deepcopy(layer).skip_nonfinite is False
    model = batchnorm.convert(nn.Sequential(nn.BatchNorm2d(8), nn.Linear(1, 1)), skip_nonfinite=False).model
    assert model[0].skip_nonfinite is False
    assert "skip_nonfinite" not in batchnorm.revert(model).model[0].__dict__
    assert BatchNorm2d(8).skip_nonfinite
    assert "skip_nonfinite" not in repr(BatchNorm2d(8))


@pytest.mark.parametrize("shape", [(4, 2), (4096, 2)])
def test_on_the_cpu_the_guard_stays(shape):
    layer = BatchNorm1d(2, skip_nonfinite=False)
    x = torch.randn(shape)
    x[1, 0] = float("nan")
    layer(x)
    assert layer.running_mean.isfinite().all()
    assert batchnorm.nonfinite_batches(layer) == {"": 1}


def test_the_guard_of_a_watched_step_works_under_a_transform_too():
    mean, var = state()

    def loss(x):
        return served_by_torch(x, mean, var, None, None, True, 0.1, 1e-5, Counters()).square().sum()

    with Quiet():
        torch.func.grad(loss)(torch.randn(SHAPE))
    assert not torch.equal(mean, state()[0])
