"""What is told of each norm that goes: one sentence, and what it saves."""

from __future__ import annotations

import pytest
import torch
from tests.lively import lively
from torch import nn
from torch.nn import functional as F

from batchnorm.folding.fold import fold
from batchnorm.folding.report.cost import Saving

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    """Layers to be put together by a function."""

    def __init__(self, run, *, norm: nn.Module | None = None, padding: int = 0, bias: bool = True):
        super().__init__()
        self.run = run
        self.a, self.b = nn.Conv2d(4, 4, 1, bias=bias), nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4) if norm is None else norm
        self.c, self.head = nn.Conv2d(4, 4, 3, padding=padding), nn.Linear(4, 2)

    def forward(self, x):
        return self.run(self, x)


class Activated(nn.BatchNorm2d):
    def forward(self, input):
        return F.relu(super().forward(input))


def scaling() -> nn.BatchNorm2d:
    """Return a norm without a shift."""
    norm = nn.BatchNorm2d(4, affine=False).eval()
    norm.running_var.fill_(3.0)
    return norm


@pytest.mark.every(3)
@pytest.mark.parametrize(("net", "into", "way", "sentence", "crossed"), [
    (Parts(lambda m, x: torch.tanh(m.bn(m.a(x)))),
     "a", "back", "Its scale and shift go back into the convolution a.", ()),
    (Parts(lambda m, x: torch.tanh(m.bn(torch.cat([m.a(x)[:, :2], m.b(x)[:, 2:]], 1)))),
     "a, b", "back", "Its scale and shift go back into the convolutions a and b, across slice and cat.",
     ("slice", "cat")),
    (Parts(lambda m, x: m.head(m.bn(torch.tanh(x)).mean((2, 3)))),
     "head", "on", "Its scale and shift go on into the linear layer head, across mean.", ("mean",)),
    (Parts(lambda m, x: m.c(torch.relu(m.bn(m.a(x) + torch.tanh(x))))),
     "a, c", "both", "It is cut in two: x + t/s goes back into the convolution a, across add; "
     "the scale s goes on into the convolution c, across relu.", ("add", "relu")),
    (Parts(lambda m, x: m.c(m.bn(torch.relu(m.a(x))) + torch.tanh(x))),
     "a, c", "both", "It is cut in two: the scale s goes back into the convolution a, across relu; "
     "the shift t goes on into the convolution c, across add.", ("relu", "add")),
    (Parts(lambda m, x: torch.tanh(m.bn(m.a(x))), norm=Activated(4)),
     "a", "back", "Its scale and shift go back into the convolution a. Its ReLU stays in place.", ()),
    (Parts(lambda m, x: m.c(m.bn(torch.tanh(x))), padding=1),
     "c", "on", "Its scale and shift go on into the convolution c. c pads with −t/s now, of which the norm made zero.",
     ()),
    (Parts(lambda m, x: torch.tanh(m.bn(torch.relu(m.a(x)))), norm=scaling()),
     "a", "back", "Its scale goes back into the convolution a, across relu.", ("relu",)),
])  # fmt: skip
def test_one_sentence_says_which_part_went_where(net, into, way, sentence, crossed) -> None:
    (told,) = fold(lively(net, positive=True, bare=False), X, borders=True).folded
    assert (told.into, told.way, told.sentence, told.crossed) == (into, way, sentence, crossed)
    assert str(told) == f"bn → {into}: folded. {sentence}"


def test_a_norm_that_only_shifts_is_told_so() -> None:
    net = lively(Parts(lambda m, x: torch.tanh(m.bn(m.a(x)))), positive=True)
    net.bn.eps = 0.0
    net.bn.running_var.fill_(1.0)
    net.bn.weight.data.fill_(1.0)
    (told,) = fold(net, X).folded
    assert told.sentence == "Its shift goes back into the convolution a."


def test_savings_count_a_new_bias_once_and_add_up_to_what_the_pass_shows() -> None:
    net = Parts(lambda m, x: torch.tanh(m.second(torch.relu(m.bn(m.a(x))))), bias=False)
    net.second = scaling()  # which crosses the ReLU, and needs no other bias
    lively(net, positive=True, bare=False)
    result = fold(net, X)
    elements = X.numel()
    assert [item.saving for item in result.folded] == [
        Saving(multiply_adds=elements, additions=elements, bytes=8 * elements),
        Saving(multiply_adds=elements, additions=0, bytes=8 * elements),
    ]
    before, after = result.costs.before, result.costs.after
    assert before.norms - after.norms == sum(item.saving.multiply_adds for item in result.folded)
    assert after.biases - before.biases == sum(item.saving.additions for item in result.folded)
    assert before.layers == after.layers
    assert before.calls - after.calls == 2


def test_names_are_those_of_the_model_where_its_input_is_normalized() -> None:
    net = lively(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()), positive=True)
    result = fold(net, X, input_mean=[1.0, 2.0, 3.0, 4.0], input_std=2.0)
    assert [item.sentence for item in result.folded] == [
        "Its scale and shift go on into the convolution 0. 0 pads with −t/s now, of which the norm made zero.",
        "Its scale and shift go back into the convolution 0.",
    ]
    shown = [node.detail for d in result.pictures.folded.diagrams for p in d.panels for node in p.nodes]
    assert "0" in shown
    assert not any("normalized_model" in detail for detail in shown)


def test_a_model_that_is_one_layer_is_called_the_model_itself() -> None:
    result = fold(nn.Conv2d(4, 4, 3, padding=1).eval(), X, input_mean=1.0, input_std=2.0)
    assert str(result.folded[0]) == (
        "input_normalization → the model itself: folded. Its scale and shift go on into the convolution of the model "
        "itself. It pads with −t/s now, of which the norm made zero."
    )
