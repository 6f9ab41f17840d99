from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.models.calling import compiled_modules_eager
from batchnorm.models.process_state import ProcessState
from batchnorm.observers import dispatch_modes, function_modes


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def now() -> tuple[bool, int, int, int]:
    return torch.is_grad_enabled(), len(dispatch_modes()), len(function_modes()), compiled_modules_eager.depth()


def test_what_was_borrowed_is_given_back() -> None:
    before, state = now(), ProcessState()
    torch.set_grad_enabled(False)
    Dispatch().__enter__()
    Function().__enter__()
    compiled_modules_eager.__enter__()
    state.restore()
    assert now() == before


def test_what_was_there_before_stays() -> None:
    with torch.no_grad(), Dispatch(), Function():
        before, state = now(), ProcessState()
        with Dispatch():
            state.restore()
            assert now() == before
            Dispatch().__enter__()  # for the block to leave
        assert now() == before
