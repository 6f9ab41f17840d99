"""All buffers or none."""

from __future__ import annotations

import pytest
import torch

from batchnorm.statistics.buffers import write_all


def test_values_are_written_in_place_and_cast() -> None:
    a, b = torch.zeros(2), torch.tensor(0)
    pointer = a.data_ptr()
    write_all([(a, torch.tensor([1.5, 2.5], dtype=torch.float64)), (b, torch.tensor(7))])
    assert a.tolist() == [1.5, 2.5]
    assert a.data_ptr() == pointer
    assert b.item() == 7


def test_a_write_that_fails_takes_back_those_before_it() -> None:
    a, b = torch.tensor([float("nan"), -0.0]), torch.zeros(1).expand(2)
    bits = a.view(torch.int32).tolist()
    with pytest.raises(RuntimeError):
        write_all([(a, torch.ones(2)), (b, torch.ones(2))])
    assert a.view(torch.int32).tolist() == bits


def test_tensors_made_in_inference_mode_are_written_too() -> None:
    with torch.inference_mode():
        frozen = torch.zeros(2)
    plain = torch.zeros(2)
    write_all([(plain, torch.ones(2)), (frozen, torch.ones(2))])
    assert plain.tolist() == frozen.tolist() == [1.0, 1.0]
