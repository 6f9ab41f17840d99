from __future__ import annotations

import threading

import pytest
import torch
from tests.interrupts import Interrupting

from batchnorm.errors import InputError, StateError, UnknownNameError
from batchnorm.functional import active_backend, backends, batch_norm, dispatch, register, unregister, use_backend
from batchnorm.kernels import REFERENCE, Reference

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([True, True, True, False])


class OnlyTraining(Reference):
    """A backend that serves some calls and counts them."""

    name = "only_training"

    def __init__(self):
        self.served = 0

    def refusal(self, request):
        return None if request.training and request.mask is None else "it serves unmasked training only"

    def train_forward(self, x, transform, eps):
        self.served += 1
        return super().train_forward(x, transform, eps)


@pytest.fixture
def fast():
    backend = OnlyTraining()
    register(backend)
    yield backend
    unregister(backend.name)


def test_torch_is_taken_where_it_can_be_and_the_reference_elsewhere():
    assert backends()[-2:] == ("torch", "reference")
    assert set(backends()) <= {"native", "torch", "reference"}
    assert active_backend(X) == active_backend(X, training=True, activation="relu", residual=X) == "torch"
    assert active_backend(X, mask=MASK) == active_backend(X, training=True, mask=MASK) == "reference"


def test_a_registered_backend_serves_what_it_does_not_refuse(fast):
    assert backends()[0] == "only_training"
    assert active_backend(X, training=True) == "only_training"
    assert active_backend(X) == "torch"
    assert active_backend(X, training=True, mask=MASK) == "reference"
    y = batch_norm(X, None, None, training=True, activation="relu")
    assert fast.served == 1
    torch.testing.assert_close(y, torch.relu(torch.nn.functional.batch_norm(X, None, None, training=True)))
    with use_backend("torch"):
        batch_norm(X, None, None, training=True)
    assert fast.served == 1


def test_second_derivatives_need_nothing_of_a_backend(fast):
    x = X.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: batch_norm(v, None, None, training=True, activation="tanh"), x)
    assert fast.served > 0


def test_names_are_unique_and_the_two_always_there(fast):
    with pytest.raises(StateError, match="there is a backend called 'only_training' already"):
        register(OnlyTraining())
    with pytest.raises(UnknownNameError, match=r"'torsh': no backend of that name; .*did you mean 'torch'"):
        register(type("Other", (OnlyTraining,), {"name": "other"})(), before="torsh")
    for name in ("torch", "reference"):
        with pytest.raises(StateError, match="always there"):
            unregister(name)
    with pytest.raises(UnknownNameError):
        unregister("other")


def test_a_forced_backend_serves_or_refuses_with_the_reason(fast):
    with use_backend("reference"):
        assert active_backend(X) == "reference"
        with use_backend("torch"):
            assert active_backend(X, training=True) == "torch"
            with pytest.raises(
                InputError, match=r"use_backend\('torch'\) cannot serve this call: torch's own .* no mask"
            ):
                batch_norm(X, None, None, training=True, mask=MASK)
        assert active_backend(X) == "reference"
    with use_backend("only_training"), pytest.raises(InputError, match="unmasked training only"):
        batch_norm(X, torch.zeros(3), torch.ones(3))
    assert active_backend(X) == "torch"
    with pytest.raises(UnknownNameError, match="did you mean 'reference'"), use_backend("referense"):
        pass


def test_the_context_ends_with_an_exception_too():
    with pytest.raises(KeyboardInterrupt), use_backend("reference"):
        raise KeyboardInterrupt
    assert active_backend(X) == "torch"
    assert dispatch.quick_choice(X, True, False) is dispatch.TORCH


def test_a_forced_backend_is_forced_in_its_thread_only():
    inside, seen = threading.Event(), {}
    done = threading.Event()

    def other():
        with use_backend("reference"):
            seen["other"] = active_backend(X)
            inside.set()
            done.wait(200)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(200)
    seen["here"] = active_backend(X)
    done.set()
    thread.join(200)
    assert seen == {"other": "reference", "here": "torch"}
    assert dispatch.quick_choice(X, True, False) is dispatch.TORCH


def test_nobody_left_to_serve_is_said_with_every_reason(monkeypatch):
    monkeypatch.setattr(Reference, "refusal", lambda self, request: "it is on holiday")
    with pytest.raises(InputError, match=r"torch: torch's own batch_norm takes no mask; reference: it is on holiday"):
        batch_norm(X, None, None, training=True, mask=MASK)


def test_torch_has_no_split_phases():
    assert dispatch.backend("reference") is REFERENCE
    with pytest.raises(StateError, match="no split phases"):
        dispatch.backend("torch")


def test_the_reference_refuses_a_device_without_float64():
    class Elsewhere:
        device = torch.device("mps")

    assert "float64" in REFERENCE.refusal(dispatch.Request(Elsewhere()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_anywhere_a_context_forces_nothing_any_more() -> None:
    def enter_and_leave() -> None:
        with dispatch.use_backend("reference"):
            pass

    for n in range(1, 1000):
        try:
            Interrupting(n).run(enter_and_leave)
        except KeyboardInterrupt:
            assert (dispatch._open, dispatch._forced.get()) == ((), None), f"interrupted at {n}"
        else:
            break
    assert n > 3
