"""A verb that one process calls on a DistributedDataParallel model does not wait for the others."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.models.calling import call_on_example

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """Give a model that would wait for other processes, if there were any, as soon as it synchronizes."""

    def waits(self: Any) -> None:
        raise AssertionError("it waits for the other processes")

    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1, bias=False)
        net = nn.Sequential(convolutions[0], nn.BatchNorm2d(8), nn.ReLU(), convolutions[1], nn.BatchNorm2d(4))
        net(torch.randn(8, 3, 8, 8))
        model = DistributedDataParallel(net)
        monkeypatch.setattr(DistributedDataParallel, "_sync_buffers", waits)
        yield model
    finally:
        distributed.destroy_process_group()


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))

VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "check": lambda model: batchnorm.check(model, X),
    "place": lambda model: batchnorm.place(model, X),
    "convert": lambda model: batchnorm.convert(model),
    "fuse": lambda model: batchnorm.convert(model, X, fuse=True),
    "diagnose": lambda model: batchnorm.diagnose(model, [X, X]),
    "recalibrate": lambda model: batchnorm.recalibrate(model, [X, X]),
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_waits_for_other_processes(wrapped: nn.Module, verb: str) -> None:
    with pytest.raises(AssertionError, match="it waits"):
        wrapped(X)
    VERBS[verb](wrapped)
    assert wrapped.require_forward_param_sync
    assert wrapped.require_backward_grad_sync


def test_a_pass_of_one_process_reduces_no_gradients_and_leaves_the_model_as_it_was(wrapped: nn.Module) -> None:
    reduced: list[int] = []

    def count(state: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(1)
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    call_on_example(wrapped.train(), X).sum().backward()
    assert not reduced
    with pytest.raises(RuntimeError, match=r"channels"):
        call_on_example(wrapped, X[:, :2])
    assert wrapped.require_forward_param_sync
    assert wrapped.require_backward_grad_sync
