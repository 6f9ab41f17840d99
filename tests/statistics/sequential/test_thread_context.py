"""What belongs to a thread reaches the thread that runs the model."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from batchnorm.statistics import recalibrate
from batchnorm.statistics.sequential.thread_context import ThreadContext

VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="")


def test_autocast_the_default_device_and_context_variables_reach_the_model() -> None:
    scale: ContextVar[float] = ContextVar("scale", default=1.0)
    seen: list[Any] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            seen.append((y.dtype, torch.empty(0).device.type, scale.get()))
            return self.norm(y)

    model = Asks()
    scale.set(2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        recalibrate(model, [torch.randn(8, 3, device="cpu"), torch.randn(8, 3, device="cpu")])
    assert set(seen) == {(torch.bfloat16, "meta", 2.0)}


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def surroundings() -> tuple[Any, ...]:
    modes = [type(mode) for mode in _get_current_function_mode_stack()]
    return (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), modes, VARIABLE.get())


def test_what_is_around_one_thread_is_set_up_in_another_and_taken_off_there() -> None:
    plain = surroundings()
    token = VARIABLE.set("mine")
    with torch.autocast("cpu", dtype=torch.float16), Mode():
        context, mine = ThreadContext(), surroundings()
    VARIABLE.reset(token)
    assert mine == (True, torch.float16, [Mode], "mine")
    seen: list[Any] = []

    def work() -> None:
        with context.here():
            seen.append(context.context.run(surroundings))
        seen.append(surroundings())

    for _ in range(2):  # as often as one likes
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [mine, plain] * 2
    assert surroundings() == plain


def test_it_is_taken_off_after_an_exception_too() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = ThreadContext()
    plain = surroundings()
    with pytest.raises(KeyError), context.here():
        raise KeyError
    assert surroundings() == plain
