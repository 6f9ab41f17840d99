"""Below autograd every operator arrives whole, and the compiler is left as it was, threads or not."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.models.calling import below_autograd, compiled_modules_eager


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def compiles() -> bool:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    return bool(graphs)


def test_operators_arrive_whole_even_from_a_compiled_module() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with below_autograd(), Seen() as seen:
        y = model(torch.randn(4, 2))
    assert [name for name in seen.names if "linear" in name or "norm" in name] == ["aten::linear", "aten::batch_norm"]
    assert not y.requires_grad
    assert torch.is_grad_enabled()
    assert compiles()


def test_threads_that_overlap_leave_the_compiler_as_it_was() -> None:
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    still_eager: list[bool] = []

    def first() -> None:
        with below_autograd():
            first_in.set()
            second_in.wait(200)
        first_out.set()

    def second() -> None:
        first_in.wait(200)
        with below_autograd():
            second_in.set()
            first_out.wait(200)
            still_eager.append(not compiles())

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert still_eager == [True]
    assert compiles()


def test_the_compiler_may_be_imported_while_another_use_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiles()
    with monkeypatch.context() as before_the_import:
        before_the_import.delitem(sys.modules, "torch._dynamo")
        compiled_modules_eager.__enter__()
    try:
        with compiled_modules_eager:
            assert not compiles()
    finally:
        compiled_modules_eager.__exit__()
    assert compiles()
