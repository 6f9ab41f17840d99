"""Verbs alone on their model, and done or not done, wherever an interrupt meets them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from tests.interrupts import Interrupting
from torch import nn
from torch.nn.modules import module as of_all_modules
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import batchnorm
from batchnorm.errors import StateError
from batchnorm.models.transaction import on_failure, transaction

# an interrupt that comes as a generator is thrown away is swallowed by the interpreter, which tells of it
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BATCHES = list(X.split(2))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    model(X)
    model[1].weight.grad = torch.ones(4)
    return model.eval()


# -- alone -----------------------------------------------------------------------------------------------------------


class Held(nn.Module):
    """Waits in its forward until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.go_on.wait(200)
        return self.inner(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # events cannot be copied
        new = Held()
        new.inner = copy.deepcopy(self.inner, memo)
        new.go_on.set()
        return new


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "recalibrate": lambda m: batchnorm.recalibrate(m, BATCHES),
    "update_bn": lambda m: batchnorm.update_bn(BATCHES, m),
    "diagnose": lambda m: batchnorm.diagnose(m, BATCHES),
    "check": lambda m: batchnorm.check(m, X),
    "place": lambda m: batchnorm.place(m, X),
    "convert": lambda m: batchnorm.convert(m),
    "revert": lambda m: batchnorm.revert(m),
    "fold": lambda m: batchnorm.fold(m, X),
    "freeze": lambda m: batchnorm.freeze(m),
    "unfreeze": lambda m: batchnorm.unfreeze(m),
    "merge": lambda m: batchnorm.merge([m, m]),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("first", ["recalibrate", "diagnose", "check"])
@pytest.mark.parametrize("second", VERBS)
def test_the_second_verb_is_refused(first: str, second: str) -> None:
    model = Held().eval()
    before = copy.deepcopy(model.state_dict())
    raised: list[BaseException] = []

    def run() -> None:
        try:
            VERBS[first](model)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert model.entered.wait(200)
        with pytest.raises(StateError, match=f"is being worked on by {first} already, in another thread"):
            VERBS[second](model)
        # the backbone of a model is part of it
        with pytest.raises(StateError, match="Sequential is being worked on"):
            VERBS[second](model.inner)
        other = network()
        batchnorm.freeze(other)
    finally:
        model.go_on.set()
        thread.join(200)
    assert raised == []
    assert not model.training
    if first != "recalibrate":
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    batchnorm.freeze(model)  # nobody has it any more


def test_undo_has_to_wait_too() -> None:
    model = Held().eval()
    model.go_on.set()
    undos = batchnorm.freeze(model), batchnorm.unfreeze(model), batchnorm.recalibrate(model, BATCHES)
    model.go_on.clear()
    model.entered.clear()
    thread = threading.Thread(target=lambda: batchnorm.check(model, X))
    thread.start()
    try:
        assert model.entered.wait(200)
        for result in undos[1:]:
            with pytest.raises(StateError, match="is being worked on by check already"):
                result.undo()
    finally:
        model.go_on.set()
        thread.join(200)
    undos[2].undo()
    undos[1].undo()
    undos[0].undo()


def test_a_verb_called_by_a_hook_of_its_model_is_refused() -> None:
    model = network()
    model[0].register_forward_hook(lambda *_: batchnorm.freeze(model))
    with pytest.raises(Exception, match="by the call that runs this hook"):
        batchnorm.check(model, X)
    model[0]._forward_hooks.clear()
    batchnorm.freeze(model)


def test_a_verb_that_fails_lets_go_of_the_model() -> None:
    model = network()
    for _ in range(2):
        with pytest.raises(batchnorm.errors.UnknownNameError):
            batchnorm.freeze(model, "nothing")


def test_the_model_may_be_given_by_name() -> None:
    batchnorm.freeze(model=network())


# -- whole -----------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[Any]:
    """Return all that a verb may change, in a form that compares."""
    state: list[Any] = [torch.is_grad_enabled(), len(_get_current_dispatch_mode_stack())]
    state += [torch._dynamo.eval_frame._stance.stance, torch._C._len_torch_function_stack()]
    state += [len(of_all_modules._global_forward_hooks), len(of_all_modules._global_forward_pre_hooks)]
    for name, module in model.named_modules():
        state.append((name, id(module), type(module), module.training, sorted(module.__dict__)))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                grad = None if tensor.grad is None else tensor.grad.tolist()
                state.append((key, id(tensor), tensor.requires_grad, tensor.tolist(), grad))
    return state


def folded() -> tuple[nn.Module, Any]:
    result = batchnorm.fold(network(), X)
    return result.model, result.pairs


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "freeze": (network, batchnorm.freeze),
    "convert": (network, lambda m: batchnorm.convert(m, inplace=True)),
    "convert, fuse": (network, lambda m: batchnorm.convert(m, X, fuse=True, inplace=True)),
    "revert": (lambda: batchnorm.convert(network()).model, lambda m: batchnorm.revert(m, inplace=True)),
    "place": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), lambda m: batchnorm.place(m, X, inplace=True)),
    "fold": (network, lambda m: batchnorm.fold(m, X, inplace=True)),
    "recalibrate": (network, lambda m: batchnorm.recalibrate(m, BATCHES, order="parallel")),
}


def test_interrupts_do_come() -> None:
    with pytest.raises(KeyboardInterrupt):
        Interrupting(5).run(lambda: batchnorm.freeze(network()))


@pytest.mark.every(3)
@pytest.mark.parametrize("few", [5, pytest.param(50, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_anywhere_a_change_is_done_or_not(name: str, few: int) -> None:
    make, change = CHANGES[name]
    counting = Interrupting(-1)
    model = make()
    counting.run(partial(change, model))
    # of many places some, but each of the last, where the change is made and the result is on its way to the caller
    most = range(1, counting.seen + 1)
    few = min(few, 12) if counting.seen > 10_000 else few
    places = [n for n in most if n > counting.seen - 2 * few or n % max(1, counting.seen // few) == 0]
    model = make()
    before = state_of(model)
    for n in places:
        try:
            Interrupting(n).run(partial(change, model))
        except KeyboardInterrupt:
            assert state_of(model) == before, f"interrupted at {n} of {counting.seen}"
        else:  # this time there were fewer
            model = make()
            before = state_of(model)


UNDO: dict[str, Callable[[Any], Any]] = {
    "freeze": batchnorm.freeze,
    "recalibrate": lambda m: batchnorm.recalibrate(m, BATCHES),
}


@pytest.mark.parametrize("name", UNDO)
def test_interrupted_anywhere_undo_is_done_or_not(name: str) -> None:
    model = network()
    original = state_of(model)
    result = UNDO[name](model)
    changed = state_of(model)
    for n in range(1, 10_000):
        try:
            Interrupting(n).run(result.undo)
        except KeyboardInterrupt:
            assert state_of(model) == changed, f"interrupted at {n}"
        else:
            break
    assert n > 10
    assert state_of(model) == original


@pytest.mark.parametrize("verb", ["unfold", "refold"])
def test_interrupted_anywhere_a_folded_model_keeps_its_shape(verb: str) -> None:
    model, pairs = folded()
    if verb == "refold":
        model = network()
    change = getattr(batchnorm, verb)
    before = state_of(model)
    for n in range(1, 10_000):
        try:
            Interrupting(n).run(lambda: change(model, pairs, inplace=True))
        except KeyboardInterrupt:
            assert state_of(model) == before, f"interrupted at {n}"
        else:
            break
    assert n > 10
    assert state_of(model) != before


def test_what_a_verb_left_of_its_modes_is_taken_away() -> None:
    class Left(torch.utils._python_dispatch.TorchDispatchMode):
        pass

    @transaction("test")
    def leaves(model: nn.Module) -> None:
        torch.set_grad_enabled(False)
        Left().__enter__()
        batchnorm.models.calling.compiled_modules_eager.__enter__()
        raise KeyboardInterrupt

    model = network()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        leaves(model)
    assert state_of(model) == before


def test_undoing_goes_on_after_an_error_and_a_second_interrupt() -> None:
    done: list[int] = []

    def interrupted_once() -> None:
        done.append(2)
        if done.count(2) == 1:
            raise KeyboardInterrupt

    def fails() -> None:
        raise RuntimeError("cannot be undone")

    @transaction("test")
    def changes(model: nn.Module) -> None:
        on_failure(lambda: done.append(1))
        on_failure(interrupted_once)
        on_failure(fails)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        changes(network())
    assert done == [2, 2, 1]
