"""The moments of equal parts are those of each part by itself, in every layout, and add up like them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.moments import Moments
from batchnorm.statistics.estimators import ESTIMATORS
from batchnorm.statistics.parts import Parts
from batchnorm.statistics.spread import Spread


@given(number=st.integers(1, 9), length=st.integers(1, 4), channels=st.integers(1, 5), space=st.integers(1, 6))
def test_each_part_is_what_it_is_alone(number: int, length: int, channels: int, space: int) -> None:
    generator = torch.Generator().manual_seed(number)
    shape = (number * length, channels, space, 2) if space > 1 else (number * length, channels)
    plain = torch.randn(shape, generator=generator, dtype=torch.float64) + 100
    layouts = [plain, plain.transpose(0, 1).contiguous().transpose(0, 1)]
    if plain.dim() == 4:
        layouts.append(plain.contiguous(memory_format=torch.channels_last))
    for x in layouts:
        parts = Parts.of(x, number)
        for index, part in enumerate(x.split(length)):
            assert_alike(parts.one(index), Moments.of(part))
        assert_alike(parts.together(), Moments.of(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_of_low_precision_are_summed_in_float64(dtype: torch.dtype) -> None:
    x = (torch.randn(12, 3, 40, generator=torch.Generator().manual_seed(0)) + 30).to(dtype)
    parts = Parts.of(x, 4)
    for index, part in enumerate(x.split(3)):
        assert_alike(parts.one(index), Moments.of(part), 1e-7)  # the kernels' own accuracy for low precision


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_estimators_and_errors_take_parts_as_they_take_batches(name: str, length: int) -> None:
    x = torch.randn(300 * length, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1
    one, other = (ESTIMATORS[name](4) for _ in range(2))
    spread, joined = Spread(), Spread()
    for index, batch in enumerate(x.split(length)):
        one.add(Moments.of(batch))
        spread.add(Moments.of(batch), index)
    start = 0
    for number in (1, 7, 64, 128, 100):
        parts = Parts.of(x[start * length : (start + number) * length], number)
        other.add_parts(parts)
        joined.add_parts(parts, start)
        start += number
    for a, b in ((one.statistics(), other.statistics()), (spread.standard_errors(), joined.standard_errors())):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert_alike(one.pooled, other.pooled)


def assert_alike(a: Any, b: Any, rtol: float = 1e-11) -> None:
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-11)
