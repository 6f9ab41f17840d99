from __future__ import annotations

import pytest
import torch

from batchnorm.models.float64 import float64_gamma, to_float64


def test_gamma_is_the_number_of_roundings_and_what_is_of_higher_order() -> None:
    v = 2.0**-53
    assert float64_gamma(0) == 0.0
    assert float64_gamma(100) > 100 * v
    assert float64_gamma(100) == pytest.approx(100 * v * (1 + 100 * v), rel=4 * v, abs=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_are_kept_exactly_and_the_history_is_not(dtype: torch.dtype) -> None:
    x = torch.tensor([1 / 3, -0.0, float("inf"), 1e-7]).to(dtype).requires_grad_()
    wide = to_float64(x * 1)
    assert wide.dtype == torch.float64
    assert not wide.requires_grad
    assert torch.equal(wide.to(dtype), x.detach())
