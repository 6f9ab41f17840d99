"""What is looked at of large feature maps: every row equally often, and the standard errors know of the rest."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.monitor.drift import judge
from batchnorm.monitor.positions import distance, looked_at, parts
from batchnorm.monitor.samples import sample_statistics
from batchnorm.monitor.stream import LayerStream, ReferenceStatistics

SHAPES = [(5, 96, 112, 112), (9, 32, 56, 56), (7, 16, 37, 41), (6, 32, 45, 24), (3, 16, 4096), (4, 8, 14, 16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [0, 3, 17])
def test_rows_at_equal_distances_that_move_on_with_the_samples(shape: tuple[int, ...], first: int) -> None:
    n, channels, *space = shape
    k = distance(shape)
    assert k > 1
    width = space[-1] if len(space) > 1 else 1
    x = torch.arange(n * channels * torch.tensor(space).prod().item(), dtype=torch.float64).view(n, channels, -1, width)
    mean, variance = sample_statistics(x.view(shape), first=first)
    for i in range(n):
        rows = x[i, :, (first + i) % k :: k].flatten(1)
        torch.testing.assert_close(mean[i], rows.mean(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(variance[i], rows.var(1, correction=0), rtol=1e-9, atol=0)


@given(st.integers(1, 40), st.integers(0, 500), st.integers(28, 120))
def test_no_sample_is_lost_and_every_row_is_looked_at(samples: int, first: int, height: int) -> None:
    shape = (samples, 16, height, 40)
    x = torch.arange(samples * height, dtype=torch.float32).view(samples, 1, height, 1).expand(shape)
    seen = parts(x, first)
    assert sum(len(part) for part in seen) == samples
    met = [int(v) for part in seen for v in part[:, 0, :, 0].flatten()]
    assert len(met) == len(set(met))
    if samples >= distance(shape):
        assert {v % height for v in met} == set(range(height))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_layout_and_type(layout: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(6, 16, 36, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = sample_statistics(x.double(), first=2)
    for laid in (x.to(memory_format=layout), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for a, b in zip(sample_statistics(laid, first=2), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    flat = x[:1].expand(6, -1, -1, -1)  # samples that lie on top of each other
    for a, b in zip(sample_statistics(flat), sample_statistics(flat.clone()), strict=True):
        torch.testing.assert_close(a, b)


def smooth(n: int, g: torch.Generator) -> torch.Tensor:
    """Maps (n, 16, 32, 32) of mean 0 and variance 1, neighbours alike, with a border that differs."""
    noise = torch.randn(n, 16, 36, 36, generator=g)
    maps = torch.nn.functional.avg_pool2d(noise, 5, stride=1) * 5
    maps[:, :, 0] += 1.0
    return maps


@cache
def reference() -> ReferenceStatistics:
    everywhere = smooth(1000, torch.Generator().manual_seed(10**6))
    return ReferenceStatistics.of(everywhere.mean((0, 2, 3)), everywhere.var((0, 2, 3)), 1e-5)


def judged(x: torch.Tensor, level: float = 0.05):
    layer = LayerStream("norm", reference())
    for part in x.split(7):
        layer.add(part)
    return judge(layer, tolerance=0.1, level=level)


def test_the_error_that_a_part_of_the_rows_leaves_is_in_the_standard_error() -> None:
    assert distance((1, 16, 32, 32)) == 8
    assert looked_at((1, 16, 32, 32)) == 128
    layers = [judged(smooth(64, torch.Generator().manual_seed(seed))) for seed in range(6)]
    assert not any(layer.flagged for layer in layers)
    z = torch.cat([layer.standard_errors for layer in layers]) * (1 + 64 / 608) ** 0.5
    assert 0.85 < z.std() < 1.15
    assert judged(smooth(64, torch.Generator().manual_seed(0)) + 0.3).flagged
