"""Which module is running, and which operators run in it: told to a subclass, whatever the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from batchnorm.monitor.forwards import ModelCall, ModuleHooks, RunningModule


class Notes(ModuleHooks):
    """Notes whatever it is told."""

    def __init__(self, model: nn.Module, norms: tuple[str, ...] = (), **begin: Any) -> None:
        super().__init__(model, norms)
        self.told: list[Any] = []
        self.options = {"looked_at": True} | begin

    def begin(self, root: nn.Module, name: str, args: tuple[Any, ...]) -> ModelCall:
        self.told.append(("begin", name))
        return ModelCall(root, **self.options)

    def operator(self, forward: ModelCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.told.append((func._schema.name.removeprefix("aten::"), forward.running[-1].name))

    def entered(self, forward: ModelCall, running: RunningModule) -> None:
        self.told.append(("enter", running.name, running.number))

    def left_unseen(self, forward: ModelCall, running: RunningModule) -> None:
        assert not torch.is_grad_enabled()
        self.told.append(("unseen", running.name))

    def begun(self, forward: ModelCall) -> None:
        self.told.append("begun")

    def ended(self, forward: ModelCall, complete: bool) -> None:
        self.told.append(("ended", complete))

    def __enter__(self) -> Notes:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def nothing_on() -> bool:
    return not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks or _get_current_dispatch_mode_stack())


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise ValueError("too many")
        return x


def model() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.ReLU(), Fails()), nn.Tanh())


X = torch.zeros(2, 3)


def test_modules_and_operators_come_in_the_order_in_which_they_run() -> None:
    net = model()
    with torch.no_grad(), Notes(net) as notes:
        net(X)
        torch.ones(1).exp()  # belongs to no call
    assert notes.told == [
        ("begin", ""),
        "begun",
        ("enter", "", 0),
        ("enter", "0", 1),
        ("enter", "0.0", 2),
        ("relu", "0.0"),
        ("enter", "0.1", 3),
        ("enter", "1", 4),
        ("tanh", "1"),
        ("ended", True),
    ]
    assert nothing_on()


def test_a_part_that_is_called_by_itself_is_a_call() -> None:
    net = model()
    with Notes(net, by_hooks=True) as notes:
        net[0](X)
        nn.ReLU()(X)  # of no model that is followed
    assert notes.told == [
        ("begin", "0"),
        "begun",
        ("enter", "0", 0),
        ("enter", "0.0", 1),
        ("enter", "0.1", 2),
        ("ended", True),
    ]


def test_a_call_that_is_passed_over_tells_its_end_and_no_more() -> None:
    net = model()
    with Notes(net, looked_at=False) as notes:
        assert notes.current is None
        net(X)
    assert notes.told == [("begin", "")]


def test_modules_that_are_expected_and_uneventful_are_not_told() -> None:
    net = model()
    with Notes(net, by_hooks=True, uneventful=["", "0", None, "elsewhere"]) as notes:
        net(X)
    assert [event[1:] for event in notes.told if event[0] == "enter"] == [("0.0", 2), ("0.1", 3), ("1", 4)]


def test_operators_may_be_shown_from_the_middle_of_a_call_on() -> None:
    class Later(Notes):
        def entered(self, forward: ModelCall, running: RunningModule) -> None:
            if running.name == "1":
                self.show_operators(forward)

    net = model()
    with torch.no_grad(), Later(net, by_hooks=True) as notes:
        net(X)
    assert [event for event in notes.told if event[0] in ("relu", "tanh")] == [("tanh", "1")]
    assert nothing_on()


def test_norms_that_were_not_seen_are_told_when_they_end() -> None:
    class Sees(Notes):
        def entered(self, forward: ModelCall, running: RunningModule) -> None:
            running.seen = running.name == "1"

    net = model()
    with Sees(net, ("0", "0.1", "1"), by_hooks=True) as notes:
        net(X)
        assert torch.is_grad_enabled()
    assert [event for event in notes.told if event[0] == "unseen"] == [("unseen", "0.1"), ("unseen", "0")]


def test_a_call_that_fails_is_ended_without_an_output_before_the_next_begins() -> None:
    net = model()
    with Notes(net, ("0.1",)) as notes:
        with pytest.raises(ValueError, match="too many"):
            net(torch.zeros(3, 3))
        assert _get_current_dispatch_mode_stack() == []
        net(X)
    assert [event for event in notes.told if event[0] in ("begin", "ended", "unseen")] == [
        ("begin", ""),
        ("ended", False),
        ("begin", ""),
        ("unseen", "0.1"),
        ("ended", True),
    ]
    assert nothing_on()


def test_after_the_end_nothing_is_told() -> None:
    net = model()
    with Notes(net) as notes:
        pass
    net(X)
    assert notes.told == []
    assert notes.closed


class Again(torch.autograd.Function):
    """Runs a model in the backward pass, as checkpoints do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: nn.Module) -> Tensor:
        ctx.net = net
        return net(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.net(torch.zeros(2, 3))
        return gradient, None


def test_what_is_looked_at_is_not_seen_itself_and_a_recomputation_is_not_looked_at() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Tanh())
    looks: list[str] = []

    class Looks(Notes):
        def entered(self, forward: ModelCall, running: RunningModule) -> None:
            self.look(lambda: (looks.append(running.name), self.look(looks.append, "inside")))

    with Looks(net, by_hooks=True):
        Again.apply(torch.zeros(2, 3, requires_grad=True), net).sum().backward()
    assert looks == ["", "0", "1"]


def test_a_mode_that_was_put_on_later_stays_on() -> None:
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Opens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.mode = Other()
            self.mode.__enter__()
            return x

    net = nn.Sequential(Opens())
    with Notes(net):
        net(X)
        assert _get_current_dispatch_mode_stack() == [net[0].mode]
        net[0].mode.__exit__(None, None, None)
    assert nothing_on()
