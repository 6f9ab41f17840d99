"""Which norms are found to be followed by an activation alone, and the reason for each of the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.dataflow.trace import trace
from batchnorm.fusion.find import find_fusions
from batchnorm.fusion.result import FusedNorm
from batchnorm.nn import BatchNorm2d, freeze

pytestmark = pytest.mark.usefixtures("deferring")


class Net(nn.Module):
    """Two norms, and a forward that a test gives."""

    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.a, self.b = BatchNorm2d(2), BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def find(forward, training=False, prepare=None):
    net = Net(forward).train(training)
    if prepare is not None:
        prepare(net)
    return find_fusions(net, trace(net, torch.randn(2, 2, 3, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("forward", "fused"),
    [
        (lambda m, x: m.relu(m.a(x)) + 1, [FusedNorm("a", "relu", False, "relu")]),
        (lambda m, x: F.silu(m.a(input=x)) + 1, [FusedNorm("a", "silu", False, "")]),
        (lambda m, x: F.gelu(m.a(x) + x) + 1, [FusedNorm("a", "gelu", True, "")]),
        (lambda m, x: torch.tanh(x + m.a(x)) + 1, [FusedNorm("a", "tanh", True, "")]),
        (lambda m, x: F.leaky_relu_(m.a(x).add_(x)) + 1, [FusedNorm("a", "leaky_relu", True, "")]),
        (lambda m, x: F.leaky_relu(m.a(x), 0.2) + 1, [FusedNorm("a", "leaky_relu(0.2)", False, "")]),
        (lambda m, x: F.hardtanh(m.a(x), 0.0, 6.0) + 1, [FusedNorm("a", "relu6", False, "")]),
        # the later of two that meet waits for less
        (lambda m, x: m.relu(m.a(x) + m.b(x)), [FusedNorm("b", "relu", True, "relu")]),
        (lambda m, x: m.relu(m.b(x) + m.a(x)), [FusedNorm("a", "relu", True, "relu")]),
        # in place, the sum is the first one's
        (lambda m, x: m.relu(m.a(x).add_(m.b(x))), [FusedNorm("a", "relu", True, "relu")]),
        # each run alike
        (
            lambda m, x: m.relu(m.a(m.relu(m.a(x)))),
            [FusedNorm("a", "relu", False, "relu")],
        ),
        (
            lambda m, x: m.relu(m.b(m.relu(m.a(m.conv(x))))),
            [FusedNorm("a", "relu", False, "relu"), FusedNorm("b", "relu", False, "relu")],
        ),
    ],
)
def test_found(forward, fused, training):
    found, refused = find(forward, training)
    assert list(found.values()) == fused
    assert set(found) | set(refused) == {"a", "b"}


def keep(m, x):
    m.kept = m.a(x)
    return m.relu(m.kept * 1) + torch.relu(m.kept)


def write_input(m, x):
    x = x * 1
    y = m.a(x)
    x.add_(1)
    return torch.relu(y) + x


def write_residual(m, x):
    r = x * 1
    y = m.a(x) + r
    r.mul_(2)
    return torch.relu(y) + r


def write_residual_after(m, x):
    r = x * 1
    return torch.relu(m.a(x) + r) + r.mul_(2)


def run_between(m, x):
    y, z = m.a(x), m.a(x + 1)
    return torch.relu(y) * torch.relu(z)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: x, "The example inputs do not reach it."),
        (lambda m, x: m.a(x), "Its output is read by the caller of the model (it is an output)."),
        (lambda m, x: m.a(x) + x, "Its sum with another tensor is read by the caller of the model (it is an output)."),
        (lambda m, x: (m.a(x), 0)[1] * x, "Its output is read by nobody."),
        (
            lambda m, x: m.conv(m.a(x)),
            "Its output is read by conv2d in conv, which is no activation that can be fused.",
        ),
        (
            lambda m, x: m.conv(m.a(x) + x),
            "Its sum with another tensor is read by conv2d in conv, which is no activation that can be fused.",
        ),
        (
            lambda m, x: F.elu(m.a(x)) + 1,
            "Its output is read by elu in the model, which is no activation that can be fused.",
        ),
        (
            lambda m, x: F.gelu(m.a(x), approximate="tanh") + 1,
            "Its output is read by gelu in the model, which is no activation that can be fused.",
        ),
        (
            lambda m, x: (lambda y: torch.relu(y) + y)(m.a(x)),
            "Its output is read by relu in the model and by add in the model.",
        ),
        (
            lambda m, x: torch.relu(m.a(x) + 1),
            "Its output is read by add in the model, which adds no other tensor to it.",
        ),
        (
            lambda m, x: torch.relu(torch.add(m.a(x), x, alpha=2)),
            "Its output is read by add in the model, which adds no other tensor to it.",
        ),
        (
            lambda m, x: torch.relu((lambda y: y + y)(m.a(x))),
            "Its output is read by add in the model, which adds no other tensor to it.",
        ),
        (
            lambda m, x: torch.relu(m.a(x) + x[:1]),
            "Its output and what add in the model adds to it differ in shape or dtype.",
        ),
        (
            lambda m, x: torch.relu((x * 1).add_(m.a(x))),
            "Its output is added in place to another tensor, by add_ in the model.",
        ),
        (lambda m, x: torch.relu(m.a(x) + m.b(x)), "Its output is added to that of b, with which the sum is fused."),
        (keep, "Its output is read by mul in the model and by relu in the model and by something that keeps it after"),
        (write_input, "Its input is written into by add_ in the model before what follows it."),
        (write_residual, "The tensor added to it is written into by mul_ in the model, and its gradient needs it."),
        (
            write_residual_after,
            "The tensor added to it is written into by mul_ in the model, and its gradient needs it.",
        ),
        (run_between, "It runs again before what follows its first run."),
        (
            lambda m, x: torch.relu(m.a(x)) + torch.tanh(m.a(x)),
            "It runs several times, and not the same follows each time.",
        ),
        (lambda m, x: torch.relu(m.a(x, residual=x)) + 1, "It is called with more than its input."),
    ],
)
def test_refused(forward, reason):
    found, refused = find(forward)
    assert "a" not in found
    assert refused["a"].startswith(reason)


def patch(net):
    net.a.forward = torch.sin


def test_what_layers_are_refused():
    def forward(m, x):
        return torch.relu(m.a(x)) + 1

    for prepare, reason in (
        (lambda net: freeze(net, "a"), "It is frozen: unfreeze it first."),
        (lambda net: setattr(net, "a", nn.BatchNorm2d(2)), "It is torch.nn.BatchNorm2d, no layer of this library."),
        (lambda net: setattr(net, "a", BatchNorm2d(2, activation="relu")), "It applies relu itself."),
        (patch, "Its forward was replaced on the instance."),
        (
            lambda net: net.a.register_forward_hook(lambda *_: None),
            "Its output is read by relu in the model and by a hook of a.",
        ),
    ):
        assert find(forward, prepare=prepare) == ({}, {"a": reason, "b": "The example inputs do not reach it."})


def test_what_begins_outside_compiled_code_does_not_end_inside():
    def forward(m, x):
        return m.relu(m.a(x)) + 1

    def compile_activation(net):
        net.relu.compile(backend="eager")

    def wrap_activation(net):
        net.relu = torch.compile(net.relu, backend="eager")

    for prepare, where in ((compile_activation, "relu"), (wrap_activation, "relu._orig_mod")):
        _, refused = find(forward, prepare=prepare)
        assert refused["a"] == f"Its output is read by relu_ in {where}, in compiled code, which fuses by itself."
    found, _ = find(forward, prepare=lambda net: net.compile(backend="eager"))
    assert list(found) == ["a"]
