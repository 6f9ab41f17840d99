"""How a model is called on what the user hands over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.errors import ArgumentTypeError

__all__ = ["Forward", "below_autograd", "call_on_batch", "call_on_example", "compiled_modules_eager"]

Forward: TypeAlias = Callable[[Module, Any], Any]


def call_on_batch(model: Module, batch: Any) -> Any:
    """Call ``model`` on one batch of a data loader.

    A tensor is the input; of a tuple or list the first element is (the rest are labels); a dict gives keyword inputs.

    Raises:
        ArgumentTypeError: the batch is of another type.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | Mapping):
        return call_on_batch(model, batch[0])
    raise ArgumentTypeError(
        f"a batch of type {type(batch).__name__}: expected a tensor, a tuple with the inputs first, or a dict of "
        "keyword inputs. Pass forward=lambda model, batch: ... to say how the model is called on it."
    )


def call_on_example(model: Module, example_inputs: Any) -> Any:
    """Call ``model`` on example inputs, as ``torch.export`` takes them.

    A tensor is the only argument, a tuple or list holds positional arguments, a dict keyword arguments.
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def below_autograd() -> Iterator[None]:
    """Run operators without autograd, compiled modules eagerly, so that a dispatch mode meets each operator whole."""
    with compiled_modules_eager, torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield


class _EagerStance:
    """``torch.compiler.set_stance("force_eager")`` for several threads at once.

    The stance is one for the whole process: of overlapping uses the first sets it and the last takes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._set = False
        self._stance = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            # what is not imported has compiled nothing, and takes a second to import
            if not self._set and "torch._dynamo" in sys.modules:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
                self._set = True
            self._users += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._stance.close()
                self._set = False


compiled_modules_eager = _EagerStance()
"""Enter it to run compiled modules eagerly; it may be entered by several threads at once."""
