"""Means and variances are those of each sample, in every layout and dtype, under masks, and of rows of one sample."""

import numpy as np
import pytest
import torch

from batchnorm.monitor.samples import sample_statistics

SHAPES = [(7, 3), (5, 3, 4), (5, 3, 4, 2), (4, 3, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sample_statistics_are_those_of_each_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    mean, variance = sample_statistics(x)
    values = x.double().numpy().reshape(shape[0], shape[1], -1)
    eps = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    assert mean.dtype == variance.dtype == torch.float64
    np.testing.assert_allclose(mean.numpy(), values.mean(2), rtol=8 * eps)
    np.testing.assert_allclose(variance.numpy(), values.var(2), rtol=0, atol=64 * eps)


def test_memory_layout_does_not_matter() -> None:
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for plain, last in zip(
        sample_statistics(x), sample_statistics(x.to(memory_format=torch.channels_last)), strict=True
    ):
        torch.testing.assert_close(plain, last)


def test_a_mean_far_above_the_spread_costs_no_digits() -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 2, 4096, generator=g, dtype=torch.float64) * 0.1 + 1e4).float()
    _, variance = sample_statistics(x)
    torch.testing.assert_close(variance, x.double().var(2, correction=0), rtol=1e-3, atol=0)


def test_masked_positions_do_not_count_even_if_nan() -> None:
    x = torch.tensor([[[1.0, 3.0, torch.nan]], [[5.0, torch.inf, torch.nan]], [[torch.nan] * 3]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    mean, variance = sample_statistics(x, mask)
    assert mean.tolist() == [[2.0], [5.0]]  # the third sample has no valid position
    assert variance.tolist() == [[1.0], [0.0]]


def test_rows_of_one_sample_are_taken_together() -> None:
    x = torch.tensor([[1.0], [3.0], [10.0], [10.0]])  # two samples of two steps each
    mean, variance = sample_statistics(x, samples=2)
    assert mean.tolist() == [[2.0], [10.0]]
    assert variance.tolist() == [[1.0], [0.0]]
    assert len(sample_statistics(x, samples=3)[0]) == 4  # 4 rows do not belong to 3 samples
