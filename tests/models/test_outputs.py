from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from batchnorm.models.outputs import difference, magnitude, named_tensors, scale_of


@dataclass
class Boxes:
    boxes: torch.Tensor
    count: int


class Plain:
    def __init__(self, tensor):
        self.tensor, self.itself = tensor, self


def test_names_lead_to_every_tensor():
    a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
    named = named_tensors({"x": [a, (b, None)], "boxes": Boxes(c, 3), "plain": Plain(d)})
    assert {n.where: float(n.tensor) for n in named} == {
        "['x'][0]": 0.0, "['x'][1][0]": 1.0, "['boxes'].boxes": 2.0, "['plain'].tensor": 3.0
    }  # fmt: skip
    assert [n.where for n in named_tensors(a)] == [""]
    assert named_tensors(None) == []


def test_tensors_are_copies():
    a = torch.zeros(2)
    (named,) = named_tensors(a)
    a += 1
    assert torch.equal(named.tensor, torch.zeros(2))


def test_difference_counts_finite_pairs():
    a = torch.tensor([1.0, math.nan, math.inf])
    gap = difference(a, torch.tensor([1.5, math.nan, math.inf]))
    assert (gap.largest, gap.compared) == (0.5, 1)
    assert difference(a, a[:2]).largest == math.inf
    assert difference(torch.tensor([1 + 1j]), torch.tensor([1 + 3j])).largest == 2
    assert difference(torch.tensor([1 + 1j]), torch.tensor([1.0])).largest == math.inf
    assert difference(torch.tensor([True]), torch.tensor([False])).largest == 1
    assert difference(torch.empty(0), torch.empty(0)).compared == 0


def test_scale_is_the_greatest_finite_magnitude():
    assert scale_of(torch.tensor([1.0, -3.0, math.nan, -math.inf])) == 3.0
    assert scale_of(torch.tensor([3 + 4j])) == 5.0
    assert scale_of(torch.tensor([math.nan])) == 0.0


def test_no_magnitude_is_minus_zero():
    for values in ([0.0, 0.0], [-0.0, 0.0], [-0.0, -0.0]):
        assert math.copysign(1.0, magnitude(torch.tensor(values))) == 1.0
    assert str(difference(torch.ones(2), torch.ones(2)).largest) == "0.0"
    assert [magnitude(torch.tensor(values)) for values in ([-3.0, 2.0], [-3.0, -2.0], [1.0, 2.0])] == [3.0, 3.0, 2.0]
