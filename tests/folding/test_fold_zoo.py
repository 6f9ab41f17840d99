"""Every pattern that a folder can get wrong: right, or refused with a reason, never wrong.

Models are float64, so that a wrong fold (off by 1e-2 and more) cannot hide behind rounding (1e-12 and less).
"""

from __future__ import annotations

import copy
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tests.folding.lively_models import Drawn, Standardized, generator, lively, randn
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval

from batchnorm.folding.fold import fold

WRONG = 1e-9


def expect(model, inputs, folded=(), left=None):
    """Fold, and check what was folded, why the others were left, and that nothing computed has changed."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = fold(model, inputs)
    assert [f"{f.norm}→{f.into}" for f in result.folded] == list(folded)
    reasons = {item.norm: item.reason for item in result.left}
    expected = left or {}
    assert list(reasons) == list(expected)
    for norm, pattern in expected.items():
        assert re.search(pattern, reasons[norm]), reasons[norm]
    assert type(result.model) is type(model)
    assert result.error <= result.bound
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(inputs))
    flatten = torch.utils._pytree.tree_leaves
    with torch.no_grad():
        for a, b in zip(flatten(call(model)), flatten(call(result.model)), strict=True):
            assert float((a - b).abs().max()) < WRONG * max(1.0, float(a.abs().max()))
    return result


# -- operators -------------------------------------------------------------------------------------------------------

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.every(6)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kwargs", [
    {}, {"bias": False}, {"padding": 1}, {"padding": "same", "dilation": 2}, {"padding": 2, "stride": 2},
    {"padding": 1, "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "replicate"}, {"groups": 2}, {"groups": 4, "bias": False},
], ids=str)  # fmt: skip
def test_convolution(n, kwargs):
    net = nn.Sequential(CONV[n](4, 8, 3, **kwargs), NORM[n](8))
    expect(lively(net), randn(2, 4, *[7] * n), ["1→0"])


@pytest.mark.every(6)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kwargs", [
    {}, {"bias": False}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2},
    {"groups": 4, "bias": False, "dilation": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("channels", [(4, 4), (4, 8)])
def test_transposed_convolution(n, kwargs, channels):
    net = nn.Sequential(TRANSPOSED[n](*channels, 3, **kwargs), NORM[n](channels[1]))
    expect(lively(net), randn(2, 4, *[4] * n), ["1→0"])


@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_rows(bias):
    expect(lively(nn.Sequential(nn.Linear(3, 5, bias=bias), nn.BatchNorm1d(5))), randn(6, 3), ["1→0"])


@pytest.mark.parametrize("length", [5, 6])
def test_linear_on_sequences_has_its_channels_on_another_axis(length):
    net = lively(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(length)))
    expect(net, randn(2, length, 3), [], {"1": r"normalizes axis 1 .* linear are on axis 2"})


def test_unbatched_convolution_has_its_channels_on_another_axis():
    net = lively(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)))
    expect(net, randn(3, 4), [], {"1": r"normalizes axis 1 .* conv1d are on axis 0"})


# -- norms -----------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """A norm of the user's own making."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mu", randn(channels, seed=1))
        self.register_buffer("var", randn(channels, seed=2).square() + 0.1)
        self.gain = nn.Parameter(randn(channels, seed=3))

    def forward(self, x):
        return F.batch_norm(x, self.mu, self.var, self.gain, None, False, 0.0, 0.25)


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels, act=None):
        super().__init__(channels)
        self.act = act if act is not None else nn.Identity()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(x)


@pytest.mark.every(2)
@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, eps=0.1), nn.SyncBatchNorm(4), Functional(4), NormAct(4),
], ids=lambda norm: type(norm).__name__)  # fmt: skip
def test_norm_is_known_by_what_it_does(norm):
    result = expect(lively(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm)), randn(2, 3, 6, 6), ["1→0"])
    assert type(result.model[1]) is nn.Identity


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_norm_with_only_a_shift_or_only_a_scale(missing):
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    net[1].register_parameter(missing, None)
    expect(net, randn(2, 3, 6, 6), ["1→0"])


def test_norm_of_a_dynamic_subclass():
    norm = nn.BatchNorm2d(4).eval()
    norm.__class__ = type("FrozenBatchNorm2d", (nn.BatchNorm2d,), {"train": lambda self, mode=True: self})
    expect(lively(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), randn(2, 3, 6, 6), ["1→0"])


class NormThen(nn.BatchNorm2d):
    """A norm and a function."""

    def __init__(self, channels, function):
        super().__init__(channels)
        self.function = function

    def forward(self, x):
        return self.function(super().forward(x))


@pytest.mark.every(2)
@pytest.mark.parametrize(("norm", "stays"), [
    (NormAct(4, nn.ReLU()), "ReLU()"),
    (NormAct(4, nn.Sequential(nn.SiLU(inplace=True), nn.Dropout(0.3))), "SiLU(inplace=True)"),
    (NormThen(4, F.relu_), "ReLU()"),
    (NormThen(4, lambda x: F.leaky_relu(x, 0.3)), "LeakyReLU(negative_slope=0.3)"),
    (NormThen(4, lambda x: torch.tanh(F.relu6(x))), "Sequential"),
])  # fmt: skip
def test_activation_in_a_norm_stays(norm, stays):
    result = expect(lively(nn.Sequential(nn.Conv2d(3, 4, 3), norm)), randn(2, 3, 6, 6), ["1→0"])
    assert stays in repr(result.model[1])
    assert not result.model[1].training


def test_norm_that_does_more_stays():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), NormThen(4, lambda x: x.cumsum(1))))
    expect(net, randn(2, 3, 6, 6), [], {"1": "more than normalize: it also runs cumsum"})


class WritesAfter(nn.Module):
    """A norm before a convolution, and a ReLU that writes into what the norm returned."""

    def __init__(self, reads_twice):
        super().__init__()
        self.first, self.bn, self.conv = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.reads_twice = reads_twice

    def forward(self, x):
        x = torch.tanh(self.first(x))
        y = self.conv(F.relu_(self.bn(x)))
        return (y, x) if self.reads_twice else y


@pytest.mark.parametrize("reads_twice", [False, True])
def test_without_a_norm_nothing_may_be_overwritten_that_it_copied(reads_twice):
    net = lively(WritesAfter(reads_twice))
    with torch.no_grad():
        net.bn.weight.abs_()
        net.bn.bias.copy_(net.bn.running_mean * net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt())  # t = 0
    reason = {"bn": "relu_ would write into what the caller of the model"} if reads_twice else {}
    expect(net, randn(2, 3, 6, 6), [] if reads_twice else ["bn→conv"], reason)


def test_norm_that_returns_more_stays():
    class Pair(nn.BatchNorm2d):
        def forward(self, x):
            return (super().forward(x),)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), Pair(4)

        def forward(self, x):
            return self.bn(self.conv(x))[0]

    expect(lively(Net()), randn(2, 3, 6, 6), [], {"bn": "more than take one tensor"})


def test_norm_in_batch_mode_stays():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    net[3].train()
    expect(net, randn(2, 3, 6, 6), ["1→0"], {"3": r"call model\.eval\(\) first"})


def test_norm_without_statistics_stays():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False, affine=False))
    expect(lively(net), randn(2, 3, 6, 6), [], {"1": "keeps no running statistics"})


def test_functional_norm_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            x = F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
            return F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x))

    left = {"bn": "called as a function in the model's own forward", "batch_norm in the model's forward": "not held"}
    expect(lively(Net()), randn(2, 3, 6, 6), [], left)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("running_var", -1.0, "negative"), ("running_var", float("nan"), "running_var is not finite"),
    ("running_mean", float("inf"), "running_mean is not finite"), ("weight", float("nan"), "weight is not finite"),
])  # fmt: skip
def test_unusable_statistics_are_refused(name, value, reason):
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    # the second norm: its poison stays in one channel of the output
    getattr(net[3], name).data[1] = value
    result = fold(net, randn(2, 3, 6, 6))
    assert [f.norm for f in result.folded] == ["1"]
    assert reason in result.left[0].reason


def test_norm_that_divides_by_zero_is_refused():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=0.0)))
    net[3].running_var[2] = 0.0
    result = fold(net, randn(2, 3, 6, 6))
    assert [f.norm for f in result.folded] == ["1"]
    assert "divides by zero" in result.left[0].reason


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("place", [0, 1])
def test_hooks_are_respected(register, place):
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    getattr(net[place], register)(lambda *_: None)
    expect(net, randn(2, 3, 6, 6), [], {"1": r"hook"})


def test_state_dict_hook_of_a_norm_is_respected():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    net[1].register_state_dict_post_hook(lambda *_: None)
    expect(net, randn(2, 3, 6, 6), [], {"1": "state-dict hook"})


def test_hook_of_a_wrapper_that_sees_the_convolution_is_respected():
    net = lively(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    net[0].register_forward_hook(lambda *_: None)
    expect(net, randn(2, 3, 6, 6), [], {"1": "also read by a hook of 0"})


def test_norm_that_is_not_reached_is_listed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.spare = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(5)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return y if y.shape[0] < 10 else self.spare(y)

    expect(lively(Net()), randn(2, 3, 6, 6), ["bn→conv"], {"spare": "do not reach it"})


# -- who else reads --------------------------------------------------------------------------------------------------


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class ReturnsBoth(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        return {"normalized": self.bn(y), "raw": y}


class KeepsState(TwoReaders):
    def forward(self, x):
        self.features = self.conv(x)
        return self.bn(self.features)


class LooksAtShape(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y).reshape(y.shape[0], -1) if y.dim() == 4 else y


class WritesIntoView(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        y[:, 0].zero_()
        return self.bn(y)


class WritesInto(TwoReaders):
    def forward(self, x):
        return self.bn(F.relu_(self.conv(x)))


class WritesIntoAfterwards(TwoReaders):
    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        y.add_(1)
        return z * y


class ReluAfterwards(TwoReaders):
    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class ReadsWeight(TwoReaders):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.mean()


class ReadsVariance(TwoReaders):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_var.mean()


class ReadsAttribute(TwoReaders):
    """Stops without the norm: an identity has no eps."""

    def forward(self, x):
        return self.bn(self.conv(x)) * (1 + self.bn.eps)


class UsesWeightElsewhere(TwoReaders):
    def forward(self, x):
        return self.bn(F.conv2d(x, self.conv.weight, None))


@pytest.mark.every(4)
@pytest.mark.parametrize(("net", "folded", "reason"), [
    (TwoReaders, False, "output of conv2d in conv is also read by add in the model"),
    (ReturnsBoth, False, "read by the caller of the model"),
    (KeepsState, False, "the model stores it"),
    (LooksAtShape, True, None),
    (WritesIntoView, False, "reads the output of zero_"),
    (WritesInto, False, "No shift can cross relu_"),
    (WritesIntoAfterwards, False, "read by add_ in the model"),
    (ReluAfterwards, True, None),
    (ReadsWeight, False, "conv.weight is also read by mean"),
    (ReadsVariance, False, "running_var is also read by mean"),
    (ReadsAttribute, False, "Without it the model stops: 'Identity' object has no attribute 'eps'"),
    (UsesWeightElsewhere, False, "used in the model, outside its own forward"),
])  # fmt: skip
def test_readers(net, folded, reason):
    expect(lively(net()), randn(2, 3, 6, 6), ["bn→conv"] if folded else [], {} if folded else {"bn": reason})


def test_norm_after_relu_is_not_paired_by_registration_order():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
    expect(net, randn(2, 3, 6, 6), [], {"2": "No shift can cross relu in 1"})


def test_registration_order_is_not_the_order_of_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn_of_b, self.b, self.bn_of_a = (
                nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            )  # fmt: skip

        def forward(self, x):
            return self.bn_of_b(self.b(torch.relu(self.bn_of_a(self.a(x)))))

    expect(lively(Net()), randn(2, 4, 5, 5), ["bn_of_a→a", "bn_of_b→b"])


def test_norm_of_an_input_goes_into_what_reads_it():
    net = lively(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    expect(net, randn(2, 3, 6, 6), ["0→1", "2→1"])


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Identity(), nn.Dropout(0.5, inplace=True),
                                     nn.AlphaDropout(0.5), nn.Dropout(0.0)])  # fmt: skip
def test_what_is_off_is_passed_through(between):
    expect(lively(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4))), randn(2, 3, 6, 6), ["2→0"])


def test_dropout_that_is_on_is_not():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4)))
    net[1].train()
    result = fold(net, randn(2, 3, 6, 6))
    assert result.left[0].reason.startswith("It reads the output of dropout")


# -- sharing ---------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution, called twice, with one norm or two."""

    def __init__(self, norms):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(norms)])

    def forward(self, x):
        for i in range(2):
            x = torch.tanh(self.norms[i % len(self.norms)](self.conv(x)))
        return x


def test_convolution_shared_by_two_norms_stays():
    reason = "conv runs 2 times, and only 1 of its outputs goes through this norm"
    expect(lively(Shared(2)), randn(2, 4, 6, 6), [], {"norms.0": reason, "norms.1": reason})


def test_pair_called_twice_is_folded_once():
    expect(lively(Shared(1)), randn(2, 4, 6, 6), ["norms.0→conv"])


def test_convolution_called_more_often_than_the_norm_stays():
    class Net(TwoReaders):
        def forward(self, x):
            return self.bn(self.conv(x)).sum() + self.conv(x).sum()

    expect(lively(Net()), randn(2, 3, 6, 6), [], {"bn": "conv runs 2 times, and only 1"})


def test_norm_shared_by_two_convolutions_is_folded_into_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.a(x)) * self.bn(self.b(x))

    expect(lively(Net()), randn(2, 3, 6, 6), ["bn→a, b"])


def test_norm_that_follows_something_else_once_stays():
    class Net(TwoReaders):
        def forward(self, x):
            return self.bn(torch.relu(self.bn(self.conv(x))))

    expect(lively(Net()), randn(2, 3, 6, 6), [], {"bn": "No shift can cross relu"})


def test_tied_weights_become_two():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.bn(self.a(x)))

    result = expect(lively(Net()), randn(2, 4, 6, 6), ["bn→a"])
    assert result.model.a.weight is not result.model.b.weight
    back = result.unfold()
    assert back.a.weight is back.b.weight


def test_tied_bias_becomes_two():
    net = lively(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)))
    net[3].bias = net[0].bias
    expect(net, randn(5, 4), ["1→0"])


def test_a_weight_that_is_registered_nowhere_else_but_read_by_another_layer_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return F.linear(self.bn(self.a(x)).relu(), self.a.weight)

    expect(lively(Net()), randn(5, 4), [], {"bn": "outside its own forward|also read by|runs 2 times"})


def test_tied_norm_parameters_are_only_read():
    net = lively(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)))
    net[3].weight, net[3].bias = net[1].weight, net[1].bias
    result = expect(net, randn(5, 4), ["1→0"], {"3": "No shift can cross relu"})
    assert torch.equal(result.model[3].weight, net[1].weight)


def test_module_registered_in_two_places_is_replaced_in_both():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.alias, self.conv = self.block[1], self.block[0]

        def forward(self, x):
            return self.alias(self.conv(x))

    result = expect(lively(Net()), randn(2, 3, 6, 6), ["block.1→block.0"])
    assert result.model.alias is result.model.block[1]
    assert type(result.model.alias) is nn.Identity


def test_norm_held_by_a_plain_list_is_found_out():
    class Net(TwoReaders):
        def __init__(self):
            super().__init__()
            self.unregistered = [self.bn]

        def forward(self, x):
            return self.unregistered[0](self.conv(x))

    expect(lively(Net()), randn(2, 3, 6, 6), [], {"bn": "still calls the norm"})


def test_closure_over_the_original_is_found_out():
    """A copied closure still calls the original's modules: folding the copy would change nothing, or too much."""
    net = lively(TwoReaders())
    closure = lambda x: net.bn(net.conv(x))  # noqa: E731

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.call = net, closure

        def forward(self, x):
            return self.call(x)

    result = fold(Net().eval(), randn(2, 3, 6, 6))
    assert not result.folded


# -- weights that are computed ---------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    """A convolution subclass that only pads more: the operator and its parameters are the module's own."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0), value=2.0))


class StandardizedAndPadded(Standardized):
    """Computes its weight, and does something to its input as well."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0), value=2.0))


class Ignores(nn.Conv2d):
    """Registers a bias that its forward does not read while it is None."""

    def forward(self, x):
        return F.conv2d(x, self.weight, None)


@pytest.mark.every(3)
@pytest.mark.parametrize(("conv", "reason"), [
    (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), None),
    (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), None),
    (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), None),
    (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), None),
    (lambda: Standardized(3, 4, 3), None),
    (lambda: StandardizedAndPadded(3, 4, 3), "is computed by sub"),
    (lambda: Drawn(3, 4, 3), "is computed by mul"),
    (lambda: Ignores(3, 4, 3, bias=False), "does not use its parameter 'bias'"),
    (lambda: Padded(3, 4, 3, bias=False), None),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights(conv, reason):
    net = lively(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    expect(net, randn(2, 3, 6, 6), [] if reason else ["1→0"], {"1": reason} if reason else {})


def test_parametrized_bias_stays():
    class Double(nn.Module):
        def forward(self, b):
            return b * 2

    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    nn.utils.parametrize.register_parametrization(net[0], "bias", Double())
    expect(net, randn(2, 3, 6, 6), [], {"1": "parametrized"})


def test_buffer_as_weight_stays():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight)

    expect(lively(nn.Sequential(Fixed(), nn.BatchNorm2d(4))), randn(2, 3, 6, 6), [], {"1": "not an ordinary parameter"})


def test_parameters_of_other_names_fold():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.offset = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return F.linear(x, self.kernel, self.offset)

    expect(lively(nn.Sequential(Kernel(), nn.BatchNorm1d(4))), randn(5, 3), ["1→0"])


def test_no_place_for_a_bias():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return F.linear(x, self.kernel)

    expect(lively(nn.Sequential(Kernel(), nn.BatchNorm1d(4))), randn(5, 3), [], {"1": "no place for one"})


# -- models ----------------------------------------------------------------------------------------------------------


def test_python_control_flow_and_dict_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3)])

        def forward(self, image, depth=3):
            x = self.stem(image)
            features = []
            for block in list(self.blocks)[:depth]:
                if float(x.detach().mean()) > -1e6:
                    x = torch.tanh(block(x))
                features.append(x)
            return {"features": features, "score": x.mean((1, 2, 3)), "count": len(features)}

    net = lively(Net())
    expect_inputs = {"image": randn(2, 3, 6, 6)}
    result = fold(net, expect_inputs)
    assert [f.norm for f in result.folded] == ["stem.1", "blocks.0.1", "blocks.1.1", "blocks.2.1"]
    a, b = net(**expect_inputs), result.model(**expect_inputs)
    assert b["count"] == 3
    assert torch.allclose(a["score"], b["score"], rtol=0, atol=WRONG)
    partly = fold(net, (randn(2, 3, 6, 6), 1))  # and with 2 in place of 1
    assert [item.norm for item in partly.left] == ["blocks.2.1"]
    for depth in range(4):
        a, b = net(*expect_inputs.values(), depth), partly.model(*expect_inputs.values(), depth)
        assert torch.allclose(a["score"], b["score"], rtol=0, atol=WRONG)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_scripted_parts_stay_and_the_rest_folds():
    scripted = torch.jit.script(lively(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    net = nn.Sequential(lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), scripted)
    expect(net, randn(2, 3, 6, 6), ["0.1→0.0"], {"1.1": "scripted"})


def test_graph_module_keeps_its_code():
    net = torch.fx.symbolic_trace(lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())))
    result = fold(net, randn(2, 3, 6, 6))
    assert [f.into for f in result.folded] == ["0"]
    assert torch.allclose(result.model(randn(2, 3, 6, 6)), net(randn(2, 3, 6, 6)), rtol=0, atol=WRONG)


def test_checkpointed_block_folds():
    class Net(TwoReaders):
        def forward(self, x):
            block = lambda x: self.bn(self.conv(x))  # noqa: E731
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    expect(lively(Net()), randn(2, 3, 6, 6), ["bn→conv"])


def test_agrees_with_an_independent_implementation():
    net = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    theirs = fuse_conv_bn_eval(copy.deepcopy(net[0]), net[1])
    ours = fold(net, randn(2, 3, 6, 6)).model[0]
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-14)
    assert torch.allclose(ours.bias, theirs.bias, rtol=1e-13)


# -- random graphs ---------------------------------------------------------------------------------------------------


class RandomNet(nn.Module):
    """A random program over a pool of values: its steps pick their operands, so anything may be read or run twice."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.convs = nn.ModuleList([
            nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
            nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
        ])  # fmt: skip
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), Functional(4), NormAct(4, nn.ReLU())]
        )
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        pool = [x]
        for kind, which, where in self.steps:
            value = pool[-1 - where % len(pool)]
            if kind == "conv":
                value = self.convs[which](value)
            elif kind == "norm":
                value = self.norms[which](value)
            elif kind == "pair":
                value = self.norms[where % 4](self.convs[which](value))
            elif kind == "add":
                value = value + pool[-1]
            elif kind == "inplace":
                value = value.tanh_() if which % 2 and value is not x else value.mul(0.5)
            elif kind == "linear":
                value = self.linear(value)
            else:
                value = F.dropout(value, 0.5, False)
            pool.append(value)
        return torch.tanh(pool[-1]), pool[len(pool) // 2] * 1.0


STEP = st.tuples(
    st.sampled_from(["conv", "norm", "pair", "pair", "conv", "norm", "add", "inplace", "linear", "drop"]),
    st.integers(0, 3),
    st.integers(0, 3),
)


@given(st.lists(STEP, min_size=2, max_size=8), st.integers(0, 99))
def test_random_graphs_compute_the_same(steps, seed):
    net = lively(RandomNet(steps), seed)
    x = randn(2, 4, 5, 5, seed=seed)
    result = fold(net, x)
    with torch.no_grad():
        expected, other = net(x.clone()), randn(3, 4, 5, 5, seed=seed + 1)
        for a, b in zip(expected, result.model(x.clone()), strict=True):
            assert float((a - b).abs().max()) < WRONG * max(1.0, float(a.abs().max()))
        for a, b in zip(net(other.clone()), result.model(other.clone()), strict=True):
            assert float((a - b).abs().max()) < WRONG * max(1.0, float(a.abs().max()))
    assert len(result.folded) + len(result.left) >= 3


class Synchronized(nn.Module):
    """Overwrites its buffers before every forward, as a wrapper for several processes does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        self.bn.running_mean.copy_(self.bn.running_mean * 1)
        return self.bn(self.conv(x))


def test_a_buffer_that_the_forward_writes_is_named_with_the_writer():
    expect(lively(Synchronized()), randn(2, 3, 6, 6), left={"bn": "running_mean is written to by copy_"})


# -- norms that the example inputs do not reach ------------------------------------------------------------------------


class Domains(nn.Module):
    """One convolution, and a norm for each domain."""

    def __init__(self, norms, pick):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = norms
        self.pick = pick

    def forward(self, x, domain=0):
        return self.pick(self.norms, domain)(self.conv(x))


@pytest.mark.parametrize(
    ("norms", "pick", "reached"),
    [
        (nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]), lambda n, k: n[k], "norms.0"),
        (
            nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), "b": nn.Sequential(nn.BatchNorm2d(4))}),
            lambda n, k: n["ab"[k]],
            "norms.a.0",
        ),
    ],
)
def test_a_norm_with_an_unreached_one_beside_it_is_left(norms, pick, reached):
    model = lively(Domains(norms, pick))
    other = reached.replace("a.0", "b.0") if "a" in reached else "norms.1"
    unreached = {other: "do not reach it"}
    result = expect(model, randn(2, 3, 6, 6), [], {reached: f"{re.escape(other)} stands beside it", **unreached})
    for domain in (0, 1):
        x = randn(2, 3, 6, 6, seed=5)
        assert torch.equal(result.model(x, domain), model(x, domain))


def test_an_unreached_block_with_layers_of_its_own_is_no_alternative():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(3))

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    expect(
        lively(Early()),
        randn(2, 3, 4, 4),
        ["blocks.0.1→blocks.0.0", "blocks.1.1→blocks.1.0"],
        {"blocks.2.1": "do not reach it"},
    )


def test_an_unreached_norm_of_another_size_is_no_alternative():
    model = lively(Domains(nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(8)]), lambda n, k: n[k]))
    expect(model, randn(2, 3, 6, 6), ["norms.0→conv"], {"norms.1": "do not reach it"})


# -- maps that travel ------------------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Layers under names, and a forward that uses them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def positive(model):
    """Let every norm have a positive γ, which crosses a ReLU."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                norm.weight.abs_().add_(0.1)
    return model


IMAGES = randn(2, 4, 6, 6)
TRAVELS = {
    "linear, transposed": (
        Steps(lambda m, x: m.bn(m.fc(x).transpose(1, 2)), fc=nn.Linear(3, 5), bn=nn.BatchNorm1d(5)),
        randn(2, 7, 3), "bn→fc",
    ),
    "linear, batch and sequence in one": (
        Steps(lambda m, x: m.bn(m.fc(x).flatten(0, 1)).view(2, 7, 5), fc=nn.Linear(3, 5), bn=nn.BatchNorm1d(5)),
        randn(2, 7, 3), "bn→fc",
    ),
    "embedding": (
        Steps(lambda m, x: m.bn(m.table(x).transpose(1, 2)), table=nn.Embedding(9, 4, padding_idx=0),
              bn=nn.BatchNorm1d(4)),
        torch.randint(0, 9, (3, 5), generator=generator()), "bn→table",
    ),
    "before a linear layer": (
        Steps(lambda m, x: m.fc(m.bn(torch.tanh(x))), bn=nn.BatchNorm1d(4), fc=nn.Linear(4, 3, bias=False)),
        randn(5, 4), "bn→fc",
    ),
    "before flatten and a linear layer": (
        Steps(lambda m, x: m.fc(m.bn(x).flatten(1)), bn=nn.BatchNorm2d(4), fc=nn.Linear(4 * 36, 3)), IMAGES, "bn→fc",
    ),
    "before a convolution without padding": (
        Steps(lambda m, x: m.conv(m.bn(x)), bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3, groups=2, stride=2)),
        IMAGES, "bn→conv",
    ),
    "before a convolution that pads by reflection": (
        Steps(lambda m, x: m.conv(m.bn(x)), bn=nn.BatchNorm2d(4),
              conv=nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False)), IMAGES, "bn→conv",
    ),
    "both branches of a sum": (
        Steps(lambda m, x: m.bn(m.a(x) + m.b(x)), a=nn.Conv2d(4, 5, 3, padding=1), b=nn.Conv2d(4, 5, 1),
              bn=nn.BatchNorm2d(5)),
        IMAGES, "bn→a, b",
    ),
    "all branches of a concatenation": (
        Steps(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 3, 1),
              bn=nn.BatchNorm2d(5)), IMAGES, "bn→a, b",
    ),
    "one half of a split": (
        Steps(lambda m, x: torch.cat([m.bn(m.conv(x).chunk(2, 1)[0]), x], 1), conv=nn.Conv2d(4, 6, 1),
              bn=nn.BatchNorm2d(3)),
        IMAGES, "bn→conv",
    ),
    "shuffled channels": (
        Steps(lambda m, x: m.bn(F.channel_shuffle(m.conv(x), 3)), conv=nn.Conv2d(4, 6, 1), bn=nn.BatchNorm2d(6)),
        IMAGES, "bn→conv",
    ),
    "mean and linear layer": (
        Steps(lambda m, x: m.fc(m.bn(x).mean((2, 3))), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 3)), IMAGES, "bn→fc",
    ),
    "average pool": (
        Steps(lambda m, x: m.conv(F.avg_pool2d(m.bn(x), 2)), bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 1)),
        IMAGES, "bn→conv",
    ),
    "convolution, average pool": (
        Steps(lambda m, x: m.bn(F.avg_pool2d(m.conv(x), 2)), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(4, 3, 1)),
        IMAGES, "bn→conv",
    ),
    "convolution, upsampled": (
        Steps(lambda m, x: m.bn(F.interpolate(m.conv(x), scale_factor=2)),
              bn=nn.BatchNorm2d(3), conv=nn.Conv2d(4, 3, 1)),
        IMAGES, "bn→conv",
    ),
    "a number in between": (
        Steps(lambda m, x: m.bn(0.5 * m.conv(x) + 2), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(4, 3, 1)), IMAGES, "bn→conv",
    ),
}  # fmt: skip


class LayerScale(nn.Module):
    """One factor for each channel between a convolution and its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
        self.gain = nn.Parameter(torch.tensor([0.5, -2.0, 3.0]).view(3, 1, 1))

    def forward(self, x):
        return self.bn(self.conv(x) * self.gain)


def test_a_factor_for_each_channel_is_crossed():
    expect(lively(LayerScale()), IMAGES, ["bn→conv"])


def test_norm_after_norm_becomes_one():
    net = Steps(lambda m, x: torch.tanh(m.b(m.a(x))), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))
    expect(lively(net), IMAGES, ["a→b"], {"b": "reads an input of the model"})


@pytest.mark.every(4)
@pytest.mark.parametrize("name", TRAVELS)
def test_map_travels(name):
    net, inputs, folded = TRAVELS[name]
    expect(lively(copy.deepcopy(net)), inputs, [folded])


CUT_IN_TWO = {
    "max pool": (lambda m, x: m.conv(F.max_pool2d(m.bn(x), 2)), "bn→conv"),
    "the shift goes back, the scale goes on": (lambda m, x: m.conv(F.relu(m.bn(m.before(x)))), "bn→before"),
    "across a sum": (lambda m, x: m.conv(torch.relu(m.bn(m.before(x) + torch.tanh(x)))), "bn→before, conv"),
}


@pytest.mark.parametrize("name", CUT_IN_TWO)
def test_a_positive_scale_crosses_what_keeps_the_order(name):
    run, folded = CUT_IN_TWO[name]
    layers = {"before": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 3, 3, padding=1)}
    if name == "max pool":
        layers |= {"conv": nn.Conv2d(4, 3, 3)}
    expect(positive(lively(Steps(run, **layers))), IMAGES, [folded])


STAYS = {
    "a negative scale before a max pool": (lambda m, x: m.conv(F.max_pool2d(m.bn(x), 2)), "no negative scale"),
    "a shift before zeros": (lambda m, x: m.padded(m.bn(x)), "pads it with zeros"),
    "one branch of a sum": (lambda m, x: m.bn(m.conv(x)) + x, None),
    "a sum with an input": (lambda m, x: torch.tanh(m.bn(m.same(x) + x)), "reads an input of the model"),
    "a gate": (lambda m, x: torch.tanh(m.bn(m.same(x) * torch.sigmoid(x))), "No shift can cross mul"),
    "softmax": (lambda m, x: m.bn(m.same(x).softmax(1)).tanh(), "output of softmax"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", STAYS)
def test_what_a_map_cannot_cross(name):
    run, reason = STAYS[name]
    layers = {"bn": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 4, 1), "same": nn.Conv2d(4, 4, 1)}
    layers |= {"padded": nn.Conv2d(4, 4, 3, padding=1)}
    expect(
        lively(Steps(run, **layers)), IMAGES, ["bn→conv"] if reason is None else [], {"bn": reason} if reason else {}
    )


def test_transposed_convolution_takes_a_scale_only():
    net = lively(Steps(lambda m, x: m.up(m.bn(x)), bn=nn.BatchNorm2d(4), up=nn.ConvTranspose2d(4, 6, 3, groups=2)))
    expect(net, IMAGES, [], {"bn": "sums of different numbers of terms"})
    with torch.no_grad():
        scale = net.bn.weight / (net.bn.running_var + net.bn.eps).sqrt()
        net.bn.bias.copy_(net.bn.running_mean * scale)
        net.bn.running_mean.zero_()
        net.bn.bias.zero_()
    expect(net, IMAGES, ["bn→up"])


@pytest.mark.parametrize("batch", [1, 5])
def test_a_folded_model_takes_batches_of_any_size(batch):
    net = lively(Steps(lambda m, x: m.fc(m.bn(m.conv(x)).flatten(1)), conv=nn.Conv2d(4, 3, 3), bn=nn.BatchNorm2d(3),
                       fc=nn.Linear(48, 2)))  # fmt: skip
    model = expect(net, IMAGES, ["bn→conv"]).model
    x = randn(batch, 4, 6, 6, seed=9)
    torch.testing.assert_close(model(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [1, (2, 0), "same"])
def test_a_shift_before_zeros_becomes_what_is_padded_with(padding):
    net = lively(Steps(lambda m, x: torch.tanh(m.after(m.conv(m.bn(x)))), bn=nn.BatchNorm2d(4),
                       conv=nn.Conv2d(4, 6, 3, padding=padding, groups=2), after=nn.BatchNorm2d(6)))  # fmt: skip
    with torch.no_grad():
        net.bn.weight[0] = -0.5  # a scale of zero cannot be made up for
    assert [f.norm for f in fold(net, IMAGES).folded] == ["after"]
    result = fold(net, IMAGES, borders=True)
    assert [f"{f.norm}→{f.into}" for f in result.folded] == ["bn→conv", "after→conv"]
    x = randn(3, 4, 5, 8, seed=5)
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(result.unfold()(x), net(x))


@pytest.mark.parametrize("cut", [lambda y: y.chunk(2, 1), lambda y: y.split(2, 1), lambda y: (y[:, :2], y[:, 2:])])
def test_two_norms_on_the_parts_of_one_output(cut):
    layers = {"conv": nn.Conv2d(4, 4, 1), "a": nn.BatchNorm2d(2), "b": nn.BatchNorm2d(2)}
    net = Steps(lambda m, x: _both(m, cut(m.conv(x))), **layers)
    expect(lively(net), IMAGES, ["a→conv", "b→conv"])


def _both(m, parts):
    return [m.a(parts[0]), m.b(parts[1])]


def test_a_reader_of_the_shape_only_is_none():
    net = Steps(lambda m, x: torch.tanh(m.bn((y := m.fc(x)).flatten(0, 1)).reshape_as(y)), fc=nn.Linear(3, 5),
                bn=nn.BatchNorm1d(5))  # fmt: skip
    expect(lively(net), randn(2, 7, 3), ["bn→fc"])


@pytest.mark.parametrize("view", [False, True])
def test_the_input_is_not_overwritten_through_norms_that_are_gone(view):
    turn = (lambda y: y.transpose(2, 3)) if view else (lambda y: y)
    layers = {"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 3, 3)}
    net = lively(Steps(lambda m, x: m.conv(F.relu_(m.b(turn(m.a(x))))), **layers))
    with torch.no_grad():  # b only scales, once a is in it
        for norm in (net.a, net.b):
            norm.weight.abs_().add_(0.1)
            norm.bias.copy_(norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt())
    x = IMAGES.clone()
    result = fold(net, x)
    result.model(x)
    assert torch.equal(x, IMAGES)
    assert "b" not in [f.norm for f in result.folded]


@pytest.mark.parametrize("first", [True, False])
def test_a_norm_called_twice_on_one_value_of_which_one_output_is_written_into(first):
    """Without the norm both outputs would be that value, and so would what is written into one of them."""

    class Net(TwoReaders):
        def forward(self, x):
            x = self.conv(x)
            if first:
                a = self.bn(x).relu_()
                return a, self.bn(x)
            b = self.bn(x)
            return self.bn(x).relu_(), b

    expect(lively(Net()), randn(2, 3, 6, 6), [], {"bn": "relu_ would write into what batch_norm in bn also reads"})


def test_a_norm_called_twice_on_one_value_goes_where_nobody_writes():
    class Net(TwoReaders):
        def forward(self, x):
            x = self.conv(x)
            return self.bn(x).relu(), self.bn(x).tanh()

    expect(lively(Net()), randn(2, 3, 6, 6), ["bn→conv"])
