"""Values that others read too: a norm goes back across them, and the others take in the inverse of what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.wired import Wired
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.folding.fold import fold

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def wired(run: Callable[[Any, Tensor], Tensor], *, positive: bool = True, **modules: nn.Module) -> nn.Module:
    """Return a network with a convolution ``stem`` and norms whose γ is not small beside β."""
    net = Wired(run, stem=nn.Conv2d(3, 4, 1), **modules).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                norm.weight.uniform_(0.5, 2, generator=generator)
                norm.bias.uniform_(0.1, 2, generator=generator)
                if not positive:
                    norm.weight[::2] *= -1
    return net


def folded(net: nn.Module) -> dict[str, str]:
    result = fold(net, X)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x.clone()), net(x.clone()), rtol=1e-12, atol=1e-12)
    return {item.norm: item.into for item in result.folded}


def dense(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    y = net.a(F.relu(net.bn1(x)))
    return net.b(F.relu(net.bn2(torch.cat([x, y], 1))))


def dense_net(*, positive: bool = True) -> nn.Module:
    modules = {"bn1": nn.BatchNorm2d(4), "a": nn.Conv2d(4, 4, 3, padding=1), "bn2": nn.BatchNorm2d(8)}
    return wired(dense, positive=positive, **modules, b=nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("positive", [True, False])
def test_another_norm_takes_in_the_inverse(positive):
    assert folded(dense_net(positive=positive)) == {"bn1": "stem, bn2"}


def test_a_convolution_takes_it_in():
    def run(net, x):
        x = net.stem(x)
        return F.relu(net.bn(x)) + net.b(x)

    assert folded(wired(run, bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1))) == {"bn": "stem, b"}


def test_a_shift_goes_along_the_sums_of_a_residual_network():
    # the scales go forth through the ReLUs; what is left is a shift, which crosses each sum up to the last norm
    def run(net, x):
        x = net.stem(x)
        x = x + net.a(F.relu(net.bn1(x)))
        return F.relu(net.bn2(x))

    net = wired(run, bn1=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, 3, padding=1), bn2=nn.BatchNorm2d(4))
    assert folded(net) == {"bn1": "stem, a, bn2"}
    # with negative scales the last one goes back instead, across the sum, and the first one takes in the inverse
    net = wired(run, positive=False, bn1=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, 1), bn2=nn.BatchNorm2d(4))
    assert folded(net) == {"bn2": "stem, bn1, a"}


def test_one_convolution_takes_in_both():
    def run(net, x):
        x = net.stem(x)
        return net.b(torch.tanh(net.bn(x + net.a(x))))

    net = wired(run, positive=False, bn=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 2, 1))
    assert folded(net) == {"bn": "stem, a"}


def test_a_norm_that_has_gone_hands_the_inverse_on():
    def run(net, x):
        x = net.stem(x)
        return net.a(net.bn1(x)) + torch.tanh(net.bn2(x))

    # the first goes into a; then the second one into the stem, and its inverse, where the first one was, into a
    net = wired(run, bn1=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, 1), bn2=nn.BatchNorm2d(4))
    assert folded(net) == {"bn1": "a", "bn2": "stem, a"}


def output(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return torch.cat([x, F.relu(net.bn(x))], 1)


def nonlinear(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return F.relu(net.bn(x)) + torch.tanh(x)


def written_into(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return F.relu(net.bn(x), inplace=True) + net.b(x)


def follows_itself(net: Any, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.b(F.relu(net.bn(x + x.flip(3))))


def hooked(net: Any, x: Tensor) -> Tensor:
    x = net.hook(net.stem(x))
    return F.relu(net.bn(x)) + net.b(x)


@pytest.mark.every(2)
@pytest.mark.parametrize("run", [output, nonlinear, written_into, follows_itself, hooked])
def test_where_the_others_cannot_take_it_in(run):
    hook = nn.Identity()
    hook.register_forward_hook(lambda *_: None)
    assert folded(wired(run, bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1), hook=hook)) == {}


@pytest.mark.parametrize("gamma", [0.0, 1e-3])
def test_a_scale_that_cannot_be_inverted(gamma):
    def run(net, x):
        x = net.stem(x)
        return F.relu(net.bn(x)) + net.b(x)

    net = wired(run, bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        net.bn.weight[1] = gamma
    result = fold(net, X)
    assert not result.folded
    # the reason is that of the way without others
    assert result.left[0].reason.startswith("The output of conv2d in stem is also read by conv2d in b.")


def test_the_way_back_gives_the_norm_that_took_it_in_its_own_parameters():
    net = dense_net()
    back = fold(net, X).unfold()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())


def test_digits_that_are_lost_all_the_same_undo_it():
    # statistics that are not those of the input: it is 10¹⁰ times as small as the norm takes it for
    def run(net, x):
        x = net.stem(x)
        return F.relu(net.bn(x)) + net.b(x)

    net = wired(run, bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1, bias=False))
    with torch.no_grad():
        net.b.weight *= 1e10
        net.stem.weight *= 1e-10
        net.stem.bias *= 1e-10
    assert folded(net) == {}
