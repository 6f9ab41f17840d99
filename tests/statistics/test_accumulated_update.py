"""One step for several micro-batches is the step of the batch that they make together."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import StateError
from batchnorm.moments import Moments
from batchnorm.nn import BatchNorm1d, BatchNorm2d

KINDS = [torch.nn.BatchNorm1d, BatchNorm1d]
EPS = torch.finfo(torch.float32).eps


def data(n=24, features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator) * 3 + torch.tensor([0.0, 5.0, -7.0])[:features]


def close(norm, expected):
    for name in ("running_mean", "running_var"):
        # each part's moments, and the result, are rounded to float32; values are below 100
        torch.testing.assert_close(getattr(norm, name), getattr(expected, name), rtol=8 * EPS, atol=16 * EPS)
    assert norm.num_batches_tracked == expected.num_batches_tracked


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_step_of_the_whole_batch(kind, momentum):
    norm = kind(3, momentum=momentum)
    whole = torch.nn.BatchNorm1d(3, momentum=momentum)
    for seed in range(3):
        x = data(seed=seed)
        with batchnorm.accumulated_update(norm):
            before = {k: v.clone() for k, v in norm.state_dict().items()}
            for part in x.split([2, 15, 7]):
                expected = copy.deepcopy(norm)(part) if seed == 0 else None
                y = norm(part)
                if expected is not None:
                    assert torch.equal(y, torch.nn.functional.batch_norm(part, None, None, training=True))
            assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
        whole(x)
        close(norm, whole)
    assert norm.momentum == momentum


@given(cuts=st.lists(st.integers(2, 9), min_size=1, max_size=5), offset=st.floats(-1e3, 1e3))
def test_however_the_batch_is_cut(cuts, offset):
    x = data(sum(cuts)) + offset
    norm = BatchNorm1d(3, momentum=1.0)
    with batchnorm.accumulated_update(norm):
        for part in x.split(cuts):
            norm(part)
    exact = Moments.of(x)
    # the means of parts are rounded to float32: an error of EPS·|mean| in the distance between them
    error = 2 * EPS * x.abs().max().item()
    spread = exact.variance(correction=1).sqrt().max().item()
    torch.testing.assert_close(norm.running_mean.double(), exact.mean, rtol=0, atol=2 * error)
    bound = 8 * error * spread + 4 * error**2 + 32 * EPS * spread**2
    torch.testing.assert_close(norm.running_var.double(), exact.variance(correction=1), rtol=0, atol=bound)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, BatchNorm2d])
@pytest.mark.parametrize("fused", [False, True])
def test_planes_large_and_fused(kind, fused):
    x = torch.randn(32, 4, 32, 32) + 1
    norm, whole = kind(4), torch.nn.BatchNorm2d(4)
    if fused and kind is BatchNorm2d:
        norm.fused = True
    with batchnorm.accumulated_update(norm):
        for part in x.split(16):
            torch.relu(norm(part))
    whole(x)
    close(norm, whole)


def test_masks_count_what_is_valid():
    x, lengths = torch.randn(6, 3, 5) * 2 + 1, torch.tensor([5, 3, 1, 4, 2, 5])
    mask = torch.arange(5) < lengths[:, None]
    norm = BatchNorm1d(3, momentum=1.0)
    with batchnorm.accumulated_update(norm):
        for part, valid in zip(x.split(2), mask.split(2), strict=True):
            norm(part, mask=valid)
    exact = Moments.of(x, mask=mask)
    torch.testing.assert_close(norm.running_mean, exact.mean.float(), rtol=8 * EPS, atol=16 * EPS)
    torch.testing.assert_close(norm.running_var, exact.variance(1).float(), rtol=8 * EPS, atol=32 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_not_finite_do_not_enter(kind):
    good, bad = data(8), data(8, seed=1)
    bad[0, 1] = float("inf")
    norm = kind(3, momentum=1.0)
    with batchnorm.accumulated_update(norm):
        norm(good)
        norm(bad)
    both, one = Moments.of(torch.cat((good, bad))), Moments.of(good)
    for channel, exact in ((0, both), (1, one), (2, both)):
        torch.testing.assert_close(norm.running_mean[channel].double(), exact.mean[channel], rtol=8 * EPS, atol=8 * EPS)
    assert norm.num_batches_tracked == 1
    if kind is BatchNorm1d:
        assert batchnorm.nonfinite_batches(norm) == {"": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_nothing_finite_leaves_everything(kind):
    norm = kind(3)
    with batchnorm.accumulated_update(norm):
        norm(torch.full((4, 3), float("nan")))
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert norm.running_var.tolist() == [1, 1, 1]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_statistics_as_they_were(failure):
    norm = BatchNorm1d(3)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with pytest.raises(failure), batchnorm.accumulated_update(norm):  # noqa: PT012
        norm(data())
        raise failure
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert "forward" not in norm.__dict__


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_count_once_even_in_torchs_layers(kind, reentrant):
    norm, whole = kind(3), torch.nn.BatchNorm1d(3)
    with batchnorm.accumulated_update(norm):
        for part in data().split(12):
            checkpoint(norm, part.requires_grad_(), use_reentrant=reentrant).sum().backward()
    whole(data())
    close(norm, whole)


def test_nested_blocks_the_innermost_decides():
    norm = BatchNorm1d(3)
    with batchnorm.accumulated_update(norm):
        norm(data())
        with batchnorm.no_update(norm):
            norm(data(seed=5))
        with batchnorm.use("running", norm):
            norm(data(seed=6))
    expected = torch.nn.BatchNorm1d(3)
    expected(data())
    close(norm, expected)
    with batchnorm.no_update(norm), batchnorm.accumulated_update(norm):
        norm(data(seed=1))
    expected(data(seed=1))
    close(norm, expected)


def test_norms_that_do_not_update_go_on_as_they_are():
    model = torch.nn.ModuleList(
        [BatchNorm1d(3).eval(), BatchNorm1d(3), torch.nn.BatchNorm1d(3, track_running_stats=False)]
    )
    batchnorm.freeze(model[1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with batchnorm.accumulated_update(model):
        for norm in model:
            norm(data())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_double_data_and_gradients_are_those_of_each_part():
    x = data().double()
    norm, plain = BatchNorm1d(3).double(), torch.nn.BatchNorm1d(3).double()
    grads = []
    for layer in (norm, plain):
        h = x.clone().requires_grad_()
        with batchnorm.accumulated_update(norm):
            for part in h.split(8):
                layer(part).sin().sum().backward()
        grads.append((h.grad, layer.weight.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_synchronized_norms_of_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with pytest.raises(StateError, match=r"^accumulated_update: SyncBatchNorm is SyncBatchNorm over several processes"):
        batchnorm.accumulated_update(torch.nn.SyncBatchNorm(3)).__enter__()


def test_a_write_that_fails_takes_the_others_back():
    model = torch.nn.ModuleList([BatchNorm1d(3), torch.nn.BatchNorm1d(3)])
    before = model[0].running_mean.clone()
    with pytest.raises(RuntimeError), batchnorm.accumulated_update(model):  # noqa: PT012
        for norm in model:
            norm(data())
        model[1].running_var = torch.ones(1).expand(3)
    assert torch.equal(model[0].running_mean, before)
    assert model[0].num_batches_tracked == 0


def test_a_second_thread_is_refused_and_changes_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
    refused: list[str] = []

    def enter() -> None:
        try:
            with batchnorm.accumulated_update(model, "1"):
                pass
        except StateError as error:
            refused.append(str(error))

    with batchnorm.accumulated_update(model):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        model(torch.randn(8, 2))
        with batchnorm.accumulated_update(model):  # the same thread may; the innermost decides
            model(torch.randn(8, 2))
    assert len(refused) == 1
    assert "another thread is in such a block" in refused[0]
    assert [norm.num_batches_tracked.item() for norm in model] == [2, 2]
    assert all("forward" not in norm.__dict__ for norm in model)
    enter()
    assert len(refused) == 1


def test_calls_of_many_threads_are_one_step() -> None:
    torch.manual_seed(0)
    norm, x = torch.nn.BatchNorm1d(3, momentum=1.0), torch.randn(64, 16, 3, dtype=torch.float64)
    norm.double()
    with batchnorm.accumulated_update(norm), ThreadPoolExecutor(8) as pool:
        list(pool.map(norm, x))
    torch.testing.assert_close(norm.running_mean, x.flatten(0, 1).mean(0))
    torch.testing.assert_close(norm.running_var, x.flatten(0, 1).var(0))
    assert norm.num_batches_tracked == 1


def test_a_call_that_outlives_the_block_takes_no_part() -> None:
    class Slow(torch.nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert over.wait(200)
            return output

    inside, over = threading.Event(), threading.Event()
    norm = Slow(1, momentum=1.0)
    with ThreadPoolExecutor(1) as pool:
        with batchnorm.accumulated_update(norm):
            norm(torch.tensor([[0.0], [2.0]]))
            late = pool.submit(norm, torch.tensor([[100.0], [200.0]]))
            assert inside.wait(200)
        over.set()
        late.result()
    assert norm.running_mean.tolist() == [1.0]
    assert norm.num_batches_tracked == 1
