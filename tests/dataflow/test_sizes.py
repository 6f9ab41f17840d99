"""Which other inputs a model is run on."""

import copy
import re

import pytest
import torch
from torch import nn

from batchnorm.dataflow.sizes import find_runs, runs_of
from batchnorm.errors import InputError
from batchnorm.models.several import Several


def runs(model, *given, accepts=None):
    labels = tuple(f"inputs {number}" for number in range(len(given)))
    return find_runs(lambda: copy.deepcopy(model), Several(given, labels), accepts)


def shapes(found):
    return [tuple(inputs.shape) for inputs in found.all]


CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("example", [(1, 3, 8, 8), (2, 3, 16, 16), (4, 3, 96, 80)])
def test_batch_and_every_axis_that_can_vary_have_other_sizes_small_large_odd_and_one(example):
    found = runs(CONVOLUTIONS, torch.randn(example))
    others = shapes(found)[2:]
    assert found.on_random_inputs
    assert found.warnings == []
    batches = {shape[0] for shape in others}
    assert len(batches - {example[0]}) >= 2
    assert 1 in {example[0], *batches}
    assert max(batches) > 16
    for axis in (2, 3):
        sizes = {shape[axis] for shape in others}
        assert {1} < sizes
        assert any(size % 2 for size in sizes - {1})
        assert max(sizes) > 256
    assert all(shape[1] == 3 for shape in others)


def test_large_examples_are_varied_with_small_inputs():
    found = runs(CONVOLUTIONS, torch.randn(1, 3, 224, 224))
    cost = sum(torch.Size(shape).numel() for shape in shapes(found)[2:])
    assert cost < 0.3 * 3 * 224 * 224


def test_values_are_of_the_examples_kind_and_some_are_negated_and_scaled():
    found = runs(CONVOLUTIONS, torch.randn(2, 3, 16, 16) + 1)
    means = [float(inputs.mean()) for inputs in found.all][2:]
    assert min(means) < -0.5 < 2 < max(means)
    assert all(bool((inputs >= 0).all()) for inputs in runs(CONVOLUTIONS, torch.rand(2, 3, 16, 16)).all)


class Joined(nn.Module):
    def forward(self, x, y, k=1):
        assert x.shape[-1] == x.shape[-2]
        return x * y * k


def test_axes_of_several_inputs_change_together_and_squares_stay_squares():
    found = find_runs(Joined, Several(((torch.ones(2, 3, 6, 6), torch.ones(2, 3, 6, 6), 3),), ("",)))
    pairs = [(tuple(x.shape), tuple(y.shape)) for x, y, _ in found.all]
    assert all(one == other and one[2] == one[3] for one, other in pairs)
    assert len({one[2] for one, _ in pairs}) >= 3
    assert {k for *_, k in found.all} == {3, 4}
    assert any("4 in place of 3" in label for label in found.all.labels)


def test_a_model_of_one_size_is_told_of_and_what_it_accepts_bounds_the_search():
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    (warning,) = runs(fixed, torch.randn(2, 3, 8, 8)).warnings
    assert "axes 2 and 3 of its input of shape (2, 3, 8, 8)" in warning
    assert runs(nn.Linear(4, 2), torch.randn(2, 4)).warnings == []
    found = runs(CONVOLUTIONS, torch.randn(2, 3, 8, 8), accepts=lambda x: len(x) == 2)
    assert {shape[0] for shape in shapes(found)} == {2}
    assert found.warnings == []


def test_the_batch_alone_can_be_fixed():
    class Pairs(nn.Module):
        def forward(self, x):
            a, b = x
            return a + b

    (warning,) = find_runs(Pairs, Several((torch.randn(2, 5),), ("",))).warnings
    assert re.search(r"axis 0 of its input of shape \(2, 5\)", warning)


def test_where_numbers_are_read_more_values_are_tried():
    class Reads(nn.Module):
        def forward(self, x):
            return x * float(x.sum())

    assert sum("scaled" in label for label in find_runs(Reads, Several((torch.randn(2, 5),), ("",))).all.labels) == 2


def test_inputs_that_were_given_have_to_run():
    with pytest.raises(InputError, match="fails on "):
        runs(CONVOLUTIONS, torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8))


def test_a_model_that_cannot_be_copied_is_run_on_its_example_alone():
    model = nn.Sequential(nn.ReLU())
    model.lock = __import__("threading").Lock()
    assert len(runs_of("place", model, torch.ones(2)).inputs) == 1
