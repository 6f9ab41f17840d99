"""A digest tells values from others, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from batchnorm.models.digest import digest_of

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "part of a larger one": lambda x: torch.cat([x, x])[2:],
    "a parameter": lambda x: torch.nn.Parameter(x),
    "conjugate": lambda x: torch.complex(x, -x).conj().resolve_conj().real,
    "negative": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strides_make_no_difference(layout: str, dtype: torch.dtype) -> None:
    if layout in ("conjugate", "negative") and dtype not in (torch.float32, torch.float64):
        pytest.skip("there are no complex numbers of that size")
    x = X.to(dtype)
    assert digest_of(LAYOUTS[layout](x)) == digest_of(x)


def test_expanded_and_overlapping_tensors_are_what_they_show() -> None:
    one = torch.ones(1, 3)
    assert digest_of(one.expand(4, 3)) == digest_of(torch.ones(4, 3))
    windows = torch.arange(6.0).unfold(0, 3, 1)
    assert digest_of(windows) == digest_of(windows.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("make", [lambda: torch.tensor(3), lambda: torch.zeros(0, 3), lambda: torch.tensor([True])])
def test_every_size_and_kind(make: Callable[[], Tensor]) -> None:
    assert digest_of(make()) == digest_of(make())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(4, device="meta"), torch.zeros(5, device="meta")),
        (torch.eye(2).to_sparse(), torch.tensor([[1.0, 0], [0, 2]]).to_sparse()),
        (torch.eye(2).to_sparse_csr(), torch.tensor([[1.0, 0], [0, 2]]).to_sparse_csr()),
        (
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            torch.quantize_per_tensor(torch.ones(2) * 2, 0.2, 0, torch.qint8),
        ),
    ],
)
def test_what_differs_has_another_digest(one: Tensor, other: Tensor) -> None:
    assert digest_of(one) != digest_of(other)
    assert digest_of(one) == digest_of(one.clone())


def test_nan_equals_itself() -> None:
    assert digest_of(torch.tensor([torch.nan])) == digest_of(torch.tensor([torch.nan]))
