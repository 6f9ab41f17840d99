"""A forward that a checkpoint runs again updates nothing, and computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from batchnorm.functional import use_backend
from batchnorm.models.recomputation import recomputing
from batchnorm.nn import BatchNorm1d, BatchNorm2d

BACKENDS = ["torch", "native", "reference"]


def block(fused: bool = False, momentum: float | None = 0.1) -> torch.nn.Sequential:
    torch.manual_seed(0)
    norms = [BatchNorm2d(4, momentum=momentum) for _ in range(2)]
    for norm in norms:
        norm.fused = fused
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    return torch.nn.Sequential(norms[0], torch.nn.ReLU(), conv, norms[1], torch.nn.ReLU(inplace=True))


def run(model, x, wrapped):
    x = x.clone().requires_grad_()
    y = wrapped(model, x)
    y.square().sum().backward()
    refused = [int(m._refused) for m in model if isinstance(m, BatchNorm2d)]
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()], refused


def kinds():
    def plain(f, x):
        return checkpoint(f, x, use_reentrant=False)

    def reentrant(f, x):
        return checkpoint(f, x, use_reentrant=True)

    return {
        "plain": plain,
        "reentrant": reentrant,
        "plain in plain": lambda f, x: plain(lambda h: plain(f, h), x),
        "reentrant in reentrant": lambda f, x: reentrant(lambda h: reentrant(f, h), x),
        "plain in reentrant": lambda f, x: reentrant(lambda h: plain(f, h), x),
        "reentrant in plain": lambda f, x: plain(lambda h: reentrant(f, h), x),
        "sequential": lambda f, x: checkpoint_sequential(f, 2, x, use_reentrant=False),
        "sequential, reentrant": lambda f, x: checkpoint_sequential(f, 2, x, use_reentrant=True),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", list(kinds()))
def test_a_checkpoint_updates_once_and_is_the_same_to_the_last_bit(kind, momentum, backend):
    x = torch.randn(8, 4, 5, 5)
    with use_backend(backend):
        expected, _ = run(block(momentum=momentum), x, lambda f, h: f(h))
        got, _ = run(block(momentum=momentum), x, kinds()[kind])
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("kind", list(kinds()))
def test_fused_layers_too(kind):
    """Large enough for the kernels, so that outputs do wait."""
    x = torch.randn(16, 4, 32, 32)
    expected, _ = run(block(fused=True), x, lambda f, h: f(h))
    got, _ = run(block(fused=True), x, kinds()[kind])
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_batch_that_is_not_finite_is_counted_once(reentrant):
    x = torch.randn(8, 4, 5, 5)
    x[0, 2, 0, 0] = float("inf")
    _, refused = run(block(), x, lambda f, h: checkpoint(f, h, use_reentrant=reentrant))
    assert refused == [1, 1]  # the convolution spreads it over all channels


def test_torchs_layers_do_update_twice():
    """What is compared with; should torch mend it, this tells."""
    norm = torch.nn.BatchNorm1d(2)
    checkpoint(norm, torch.randn(4, 2, requires_grad=True), use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == 2


def test_an_output_that_waits_until_the_backward_pass_is_taken_in_all_the_same():
    norm, plain = BatchNorm2d(4), BatchNorm2d(4)
    norm.fused = True
    x = torch.randn(16, 4, 32, 32)
    waiting = norm(x)
    y = torch.ones(1, requires_grad=True) * 2
    y.register_hook(lambda grad: grad + 0 * waiting.sum())
    y.backward()
    plain(x)
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, plain.running_mean)


def test_it_is_told_in_the_backward_pass_alone():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(recomputing()))
    seen.append(recomputing())
    (x * 2).backward()
    seen.append(recomputing())
    assert seen == [False, True, False]


def test_two_training_forwards_and_checkpoints_before_one_backward():
    norm = BatchNorm1d(3)
    twin = copy.deepcopy(norm)
    x, z = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    results = []
    for layer, wrap in ((norm, lambda f, h: checkpoint(f, h, use_reentrant=False)), (twin, lambda f, h: f(h))):
        a, b = wrap(layer, x), wrap(layer, z)
        layer.running_mean.copy_(layer.running_mean.clone())  # a broadcast of buffers
        results.append([*torch.autograd.grad((a * b).sin().sum(), (x, z, layer.weight)), *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_checkpoint_updates_once():
    """Through AOTAutograd, which runs no module again; torch's own eager backend fails on any buffer written inside."""
    x, expected, got = torch.randn(8, 4, 5, 5), block(), block()
    step = torch.compile(lambda x: checkpoint(got, x, use_reentrant=False), backend="aot_eager")
    for model, call in ((expected, expected), (got, step)):
        call(x.clone().requires_grad_()).sum().backward()
        assert model[0].num_batches_tracked == 1
    torch.testing.assert_close(list(got.buffers()), list(expected.buffers()))
