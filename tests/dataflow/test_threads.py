from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from batchnorm.dataflow.threads import one_thread, threads_for_float64
from batchnorm.dataflow.trace import trace


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_one_thread_for_as_long_as_the_context_lasts(error: type[BaseException] | None) -> None:
    seen = []

    def body() -> None:
        with one_thread(), one_thread():
            seen.append(torch.get_num_threads())
            if error is not None:
                raise error

    if error is None:
        body()
    else:
        with pytest.raises(error):
            body()
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("groups", "threads"), [(1, 2), (16, 1)])
def test_only_convolutions_of_many_groups_get_one_thread(groups: int, threads: int) -> None:
    graph = trace(nn.Conv2d(16, 16, 3, groups=groups), torch.randn(1, 16, 5, 5))
    with threads_for_float64(graph):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2
