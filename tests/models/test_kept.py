"""Whether a model keeps something of its calls."""

import functools

import pytest
import torch
from torch import nn

from batchnorm import fold
from batchnorm.dataflow.sizes import find_runs
from batchnorm.models.kept import Kept
from batchnorm.models.several import Several

X = torch.ones(2, 3, 6, 6)


class Net(nn.Module):
    """A network with attributes of all plain kinds, and one that is given."""

    def __init__(self, change=None, extra=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.numbers, self.by_name, self.chosen = [1, (2.0, "a")], {"a": {1, 2}}, torch.float32
        self.act, self.step = functools.partial(torch.relu), self.conv.forward
        self.again = [self.conv, self.conv.weight]
        self.change, self.extra = change, extra

    def forward(self, x):
        if self.change is not None:
            self.change(self)
        return self.act(self.bn(self.conv(x)))


def test_a_model_of_plain_attributes_is_what_it_was_after_a_run():
    net = Net().eval()
    kept = Kept(net)
    net(X)
    assert kept.is_known
    assert kept.is_still_in(net)


CHANGES = {
    "an attribute": lambda net: setattr(net, "count", 1),
    "a number of another type": lambda net: setattr(net, "numbers", [True, (2.0, "a")]),
    "an item of a list": lambda net: net.numbers.append(3),
    "an entry of a dict of sets": lambda net: net.by_name["a"].add(3),
    "an equal list in place of one": lambda net: setattr(net, "numbers", list(net.numbers)),
    "a module in place of another": lambda net: net._modules.update(conv=nn.Conv2d(3, 4, 3)),
    "the values of a parameter": lambda net: net.conv.weight.data is None or net.conv.weight.detach().mul_(2),
    "a hook": lambda net: net.conv.register_forward_hook(lambda *args: None),
    "the class": lambda net: setattr(net.bn, "__class__", nn.BatchNorm1d),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen(change):
    net = Net()
    kept = Kept(net)
    change(net)
    assert not kept.is_still_in(net)


class Own:
    """An object of which nothing is known."""


OTHERS = {
    "own class": Own(),
    "tensor": torch.ones(2),
    "list of tensors": [torch.ones(2)],
    "dict of an own class": {"a": Own()},
    "iterator": iter([1]),
    "module": nn.ReLU(),
}


@pytest.mark.parametrize("extra", OTHERS.values(), ids=OTHERS.keys())
def test_of_other_objects_nothing_is_known(extra):
    net = Net(extra=(extra,))
    kept = Kept(net)
    assert not kept.is_known
    assert not kept.is_still_in(net)


def found(net):
    made = []

    def copied():
        made.append(Net(net.change, net.extra).eval())
        return made[-1]

    return find_runs(copied, Several((X,), ("the example inputs",))), made


def test_a_model_that_keeps_nothing_is_searched_on_one_copy_though_it_stops_at_some_sizes():
    runs, made = found(Net())
    assert len(made) == 1
    assert runs.model is made[0]


@pytest.mark.parametrize("keeping", ["a counter", "an object"])
def test_one_that_keeps_something_gets_a_new_copy_where_it_stopped(keeping):
    net = Net(lambda n: n.numbers.append(0)) if keeping == "a counter" else Net(extra=Own())
    runs, made = found(net)
    assert len(made) > 1
    assert runs.model is None


@pytest.mark.parametrize(
    ("keeping", "expected"), [(None, (11, 4)), (lambda net: net.numbers.append(0), (12, 5))], ids=["nothing", "a count"]
)
def test_passes_on_inputs_of_the_examples_shape_are_as_many_as_is_said(monkeypatch, keeping, expected):
    passes, real = {torch.float32: 0, torch.float64: 0}, Net.forward

    def forward(self, x):
        passes[x.dtype] += x.shape == X.shape
        return real(self, x)

    monkeypatch.setattr(Net, "forward", forward)
    assert [norm.norm for norm in fold(Net(keeping).eval(), X).folded] == ["bn"]
    assert (passes[torch.float32], passes[torch.float64]) == expected
