"""How a model is called on what the user hands over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_map

from batchnorm.errors import ArgumentTypeError
from batchnorm.models.unsynchronized import unsynchronized
from batchnorm.observers import compiler_stance, eager_stance, set_compiler_stance

__all__ = [
    "EagerUse",
    "Forward",
    "below_autograd",
    "call_on_batch",
    "call_on_example",
    "compiled_modules_eager",
    "fresh_inputs",
]

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

    A tensor is the only argument, a tuple or list holds positional arguments, a dict keyword arguments. What other
    processes do makes no difference: a model in DistributedDataParallel does not wait for them.
    """
    with unsynchronized(model):
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

    The stance is one for the whole process: of overlapping uses the first sets it and the last takes it back. Who uses
    it is counted by thread, so that a thread whose ``with`` block was interrupted can be taken out
    (:meth:`leave_to`), and one that has ended counts no more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depths: MutableMapping[threading.Thread, int] = WeakKeyDictionary()
        self._eager: Any = None  # the stance that is set; made when it is first needed
        self._before: Any = None  # the stance to go back to

    def __enter__(self) -> None:
        depth = self.depth()
        try:
            self.leave_to(depth + 1)
        except BaseException:
            self._depths[threading.current_thread()] = depth
            raise

    def __exit__(self, *exception: object) -> None:
        self.leave_to(max(0, self.depth() - 1))

    def depth(self) -> int:
        """Return how many uses this thread is in."""
        return self._depths.get(threading.current_thread(), 0)

    def forget(self, thread: threading.Thread) -> None:
        """Count a thread no more, which is stuck."""
        self._depths.pop(thread, None)
        self.leave_to(self.depth())

    def leave_to(self, depth: int) -> None:
        """Let this thread be in so many uses, and set the stance that all threads together ask for.

        Raises:
            RuntimeError: this runs in code that is being compiled, or was.
        """
        with self._lock:
            self._depths[threading.current_thread()] = depth
            wanted, now = any(self._depths.values()), compiler_stance()
            if now is None:
                return
            # The stance itself says whether it is ours: an interrupt between two lines leaves nothing contradictory.
            if wanted and now is not self._eager:
                self._before = now
                self._eager = self._eager or eager_stance()
                set_compiler_stance(self._eager)
            elif not wanted and now is self._eager:
                set_compiler_stance(self._before)


compiled_modules_eager = _EagerStance()
"""Enter it to run compiled modules eagerly; it may be entered by several threads at once."""


class EagerUse:
    """A use of ``compiled_modules_eager`` by a block; its end may be interrupted, and repeated."""

    def __init__(self) -> None:
        self._after: int | None = compiled_modules_eager.depth()  # of this thread's uses, those that are left

    def begin(self) -> None:
        """Enter it."""
        compiled_modules_eager.__enter__()
        self._after = None

    def end(self) -> None:
        """Leave it, if it was entered."""
        if self._after is None:  # blocks may end in another order than they began in
            self._after = max(0, compiled_modules_eager.depth() - 1)
        compiled_modules_eager.leave_to(self._after)


def fresh_inputs(example_inputs: Any) -> Any:
    """Return the inputs with every tensor copied, one that occurs twice once, so that a forward may write into them."""
    copies: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.detach().clone()
        return copies[id(leaf)]

    return tree_map(copied, example_inputs)
