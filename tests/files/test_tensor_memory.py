import pytest
import torch
from tests.layouts import DENSE, LAYOUTS

from batchnorm.files.tensor_memory import bytes_of, without_repeats

SHAPES = [(), (0,), (1,), (5,), (3, 0, 2), (8, 3, 1, 1), (1, 4, 1, 2), (4, 1, 3, 3), (2, 3, 1, 2, 1), (1, 1, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.complex64]


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_are_those_of_the_elements_in_order(layout, shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.flatten().tolist()
    found = bytes_of(DENSE[layout](values))
    assert found.shape == (values.numel() * values.element_size(),)
    assert found.clone().view(dtype).tolist() == expected if values.numel() else found.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_has_no_repeats_can_be_written_and_shows_everywhere(layout, shape):
    t = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    without_repeats(t).fill_(3.0)
    assert torch.equal(t, torch.full(shape, 3.0))


def test_lazily_conjugated_and_negated_tensors_have_the_bytes_of_their_values():
    t = torch.randn(3, dtype=torch.complex64)
    assert torch.equal(bytes_of(t.conj()), bytes_of(t.conj().resolve_conj()))
    assert torch.equal(bytes_of(t.conj().imag), bytes_of(-t.imag))
