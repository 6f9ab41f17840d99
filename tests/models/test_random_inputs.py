"""Other inputs are like the example's: of its shapes, types and ranges, with other values."""

import torch

from batchnorm.models.random_inputs import random_like


def test_floating_point_numbers_keep_mean_deviation_and_type():
    example = torch.randn(1000, generator=torch.Generator().manual_seed(0)).half() * 3 + 20
    other = random_like((example,))[0]
    assert other.dtype == torch.float16
    assert other.shape == example.shape
    assert not torch.equal(other, example)
    assert abs(float(other.float().mean()) - 20) < 1
    assert abs(float(other.float().std()) - 3) < 0.5


def test_where_there_are_no_negative_ones_there_are_none():
    assert bool((random_like(torch.rand(100)) >= 0).all())


def test_a_constant_becomes_standard_normal():
    other = random_like({"x": torch.zeros(1000, dtype=torch.float64)})["x"]
    assert abs(float(other.std()) - 1) < 0.1


def test_indices_and_masks_change_places():
    indices, mask = torch.arange(50).reshape(5, 10), torch.arange(50) < 7
    one, two = random_like([indices, mask])
    assert sorted(one.flatten().tolist()) == list(range(50))
    assert one.shape == indices.shape
    assert not torch.equal(one, indices)
    assert int(two.sum()) == 7


def test_what_is_no_tensor_stays_and_the_example_does():
    example = (torch.ones(3), 4, "five", None)
    other = random_like(example)
    assert other[1:] == (4, "five", None)
    assert torch.equal(example[0], torch.ones(3))


def test_empty_and_not_finite_ones():
    assert random_like(torch.zeros(0)).shape == (0,)
    assert bool(torch.isfinite(random_like(torch.tensor([1.0, float("nan"), 3.0]))).all())
