"""A batch on its way can be left at any moment, whoever fails or waits for whom."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.statistics.sequential.networks import assert_alike, expected, images, network
from torch import Tensor, nn

from batchnorm.errors import BatchError
from batchnorm.models.calling import compiled_modules_eager
from batchnorm.statistics import recalibrate
from batchnorm.statistics.operators import NormCall
from batchnorm.statistics.sequential import run, sweep


@pytest.mark.parametrize("memory", [None, 10_000])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_interrupt_inside_a_norm_leaves_no_thread(
    memory: Any, at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    model, calls, run_on = network(), [], NormCall.run_on

    def interrupted(self: NormCall, *statistics: Tensor) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return run_on(self, *statistics)

    monkeypatch.setattr(NormCall, "run_on", interrupted)
    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, images(4, 4, 4), memory=memory, cache=tmp_path)
    assert set(threading.enumerate()) <= threads
    assert list(tmp_path.iterdir()) == []


def test_a_norm_that_cannot_run_is_a_failure_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: NormCall, *statistics: Tensor) -> Any:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(NormCall, "run_on", failing)
    threads = set(threading.enumerate())
    with pytest.raises(BatchError, match=r"failed on batch 0 .*no kernel for this device"):
        recalibrate(network(), images(4, 4, 4))
    assert set(threading.enumerate()) <= threads


class Locked(nn.Module):
    """One forward pass at a time, as servers do it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lock = network(), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            out: Tensor = self.inner(x)
        return out


def test_a_batch_that_waits_for_the_lock_of_another_is_run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_PATIENCE", 0.5)
    model, batches, threads = Locked(), images(4, 4, 4), set(threading.enumerate())
    result = recalibrate(model, batches)
    assert "or a lock" in result.notes[0]
    assert set(threading.enumerate()) <= threads
    assert_alike(model.inner, expected(network(), batches))


def test_an_interrupt_while_a_batch_waits_for_a_lock_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threads = Locked(), set(threading.enumerate())

    def go(self: Any, answer: Any = None, patience: Any = None) -> Any:
        if patience is None:
            return real(self, answer, None)
        self._replies.put(answer)  # it goes on, and waits for the lock, while the interrupt comes here
        raise KeyboardInterrupt

    real = sweep.ModelRun.go
    monkeypatch.setattr(sweep.ModelRun, "go", go)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, images(4, 4))
    assert set(threading.enumerate()) <= threads
    assert not model.lock.locked()


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.norm2, self.norm3 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv(x))
        x = torch.cond(x.sum() < torch.inf, lambda y: self.norm2(y.relu()), torch.cos, (x,))
        out: Tensor = self.norm3(x)
        return out


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_norms_inside_the_branches_of_a_cond_are_measured(order: Any) -> None:
    torch.manual_seed(0)
    model, batches = Chooses(), images(4, 6, 8)
    plain = nn.Sequential(model.conv, model.norm1, nn.ReLU(), model.norm2, model.norm3)
    plain = copy.deepcopy(plain)
    result = recalibrate(model, batches, order=order)
    recalibrate(plain, batches, order=order)
    assert [layer.name for layer in result.layers] == ["norm1", "norm2", "norm3"]
    for name, buffer in zip(dict(model.named_buffers()), plain.buffers(), strict=True):
        torch.testing.assert_close(model.get_buffer(name), buffer)


class Loops(nn.Module):
    """Never comes out of its own code, in which it calls no operator."""

    def __init__(self, wait: Callable[[], object]) -> None:
        super().__init__()
        self.norm, self.wait, self.entered = nn.BatchNorm2d(3), wait, threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        self.entered.set()
        while True:
            self.wait()


def interrupted(model: Loops) -> None:
    """Recalibrate a model, and press Ctrl-C where it does not come out of its code."""
    before = copy.deepcopy(model.norm.state_dict())

    def press() -> None:
        assert model.entered.wait(200)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, images(2, 4))
    pressing.join()
    assert all(torch.equal(value, before[key]) for key, value in model.norm.state_dict().items())
    assert model.training
    assert compiled_modules_eager.depth() == 0


def test_one_interrupt_ends_a_model_that_loops_in_python() -> None:
    threads = set(threading.enumerate())
    interrupted(Loops(lambda: None))
    assert set(threading.enumerate()) <= threads


def test_one_interrupt_gives_up_a_model_that_waits_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GIVE_UP", 1)
    threads, let_go = set(threading.enumerate()), threading.Lock()
    let_go.acquire()
    with pytest.warns(RuntimeWarning, match="a thread is left behind"):
        interrupted(Loops(lambda: let_go.acquire()))
    assert not any(compiled_modules_eager._depths.values())
    let_go.release()  # the call ends, and with it the thread
    for thread in set(threading.enumerate()) - threads:
        thread.join(200)
        assert not thread.is_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 3])
def test_a_thread_that_never_begins_hides_no_error(
    error: type[BaseException], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt may come before the first line of ``Thread.start``; and the system may refuse a thread."""
    model, starts, start = network(), [], threading.Thread.start

    def failing(self: threading.Thread) -> None:
        starts.append(self)
        if len(starts) == at or (error is RuntimeError and len(starts) > at):
            raise error("no thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing)
    threads = set(threading.enumerate())
    with pytest.raises((KeyboardInterrupt, RuntimeError), match="no thread"):
        recalibrate(model, images(4, 4, 4))
    assert set(threading.enumerate()) <= threads
    assert compiled_modules_eager.depth() == 0
