"""A map carried to the layers that absorb it: both parts, what is crossed, and when it has to stay."""

from __future__ import annotations

import pytest
import torch
from tests.folding.lively_models import lively, randn
from torch import nn

from batchnorm.dataflow.norms import norm_uses
from batchnorm.dataflow.refusal import Refusal
from batchnorm.dataflow.trace import trace
from batchnorm.folding.planning.carry import carry
from batchnorm.folding.planning.merged_parameters import Parameters
from batchnorm.folding.planning.splits import Split
from batchnorm.travel.maps import Map

X = randn(2, 4, 6, 6)
SCALE = Map(torch.tensor([2.0, 3.0, 1.0, 4.0], dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
SHIFT = Map(torch.ones(4, dtype=torch.float64), torch.tensor([1.0, -1.0, 0.0, 5.0], dtype=torch.float64))


class Net(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.a, self.bn, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.run(self, x)


def carried(run, split: Split, *, sharing: bool = False):
    """Carry the parts of a map from the norm of a network, and return where they went and the new parameters."""
    model = lively(Net(run))
    graph = trace(model, X)
    (use,) = norm_uses(model, graph)
    parameters = Parameters.of(model, graph)
    return carry(graph, use, split, parameters, set(), sharing=sharing), parameters, model


def straight(m, x):
    return m.b(m.bn(m.a(x)))


def names(part):
    return [layer.name for layer in part.layers]


def test_the_part_before_goes_into_the_output_of_the_layer_before() -> None:
    found, parameters, model = carried(straight, Split(SCALE, None))
    assert names(found.back) == ["a"]
    assert (found.on, found.inverse) == (None, ())
    expected = model.a.weight * SCALE.scale.view(4, 1, 1, 1)
    torch.testing.assert_close(parameters.changed["a.weight"], expected)
    assert [value.producer.name for value in found.crossed] == ["conv2d"]


def test_the_part_after_goes_into_the_input_of_the_layer_after() -> None:
    found, parameters, model = carried(straight, Split(None, SHIFT))
    assert names(found.on) == ["b"]
    assert (found.back, found.inverse) == (None, ())
    expected = model.b.bias + model.b.weight[:, :, 0, 0] @ SHIFT.shift
    torch.testing.assert_close(parameters.changed["b.bias"], expected)


def test_both_parts_of_a_map_that_is_cut_in_two() -> None:
    found, parameters, _ = carried(straight, Split(SCALE, SHIFT))
    assert (names(found.back), names(found.on)) == (["a"], ["b"])
    assert set(parameters.changed) >= {"a.weight", "b.weight", "b.bias"}


def reads_twice(m, x):
    y = m.a(x)
    return m.bn(y).tanh(), m.b(y)


def test_another_reader_takes_in_the_inverse_if_that_is_allowed() -> None:
    found, parameters, model = carried(reads_twice, Split(SCALE, None), sharing=True)
    assert (names(found.back), [layer.name for layer in found.inverse], found.on) == (["a"], ["b"], None)
    torch.testing.assert_close(parameters.changed["b.weight"], model.b.weight / SCALE.scale.view(1, 4, 1, 1))
    with pytest.raises(Refusal, match="is also read by conv2d in b"):
        carried(reads_twice, Split(SCALE, None))


def in_a_circle(m, x):
    y = m.a(x)
    for _ in range(2):
        y = m.bn(y)
    return m.b(y)


def test_the_parts_of_a_norm_that_reads_its_own_output_do_not_cross_each_other() -> None:
    with pytest.raises(Refusal, match="Its output feeds back into its own input"):
        carried(in_a_circle, Split(SCALE, SHIFT))
    found, _, _ = carried(in_a_circle, Split(SCALE, None))  # in one part it follows itself
    assert names(found.back) == ["a"]


def test_what_nothing_absorbs_is_refused() -> None:
    with pytest.raises(Refusal, match="the output of tanh"):
        carried(lambda m, x: m.b(m.bn(m.a(x).tanh())), Split(SCALE, None))
    with pytest.raises(Refusal, match="an output"):
        carried(lambda m, x: m.bn(m.b(m.a(x))), Split(None, SHIFT))


def test_an_input_of_the_model_is_not_overwritten_once_the_norm_copies_it_no_more() -> None:
    with pytest.raises(Refusal, match="mul_ would write into what the caller of the model, whose"):
        carried(lambda m, x: m.b(m.bn(x).mul_(2)), Split(None, SCALE))
