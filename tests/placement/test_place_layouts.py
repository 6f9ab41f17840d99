"""Norms are put into models, and called on inputs, that lie in memory in every way that a tensor can."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.layouts import DENSE, LAYOUTS, input_of, lay_out
from torch import nn

from batchnorm import place

EVERY = [*((layout, "contiguous") for layout in LAYOUTS), *(("channels_last", layout) for layout in LAYOUTS)]


def bare(layout: str) -> nn.Module:
    """A network without norms: convolutions of 3 and 1, a depthwise and a transposed one, and a linear layer."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 4, 2),
    ]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(4, 4)).append(nn.ReLU())
    return lay_out(model.append(nn.Linear(4, 3)), LAYOUTS[layout])


@pytest.mark.every(4)
@pytest.mark.parametrize(("layout", "of_input"), EVERY)
def test_norms_are_placed_as_in_a_contiguous_model(layout: str, of_input: str) -> None:
    model, x = bare(layout), input_of(of_input)
    plain = lay_out(copy.deepcopy(model), LAYOUTS["contiguous"])
    before = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    result, due = place(model, x), place(plain, x.clone(memory_format=torch.contiguous_format))
    assert [norm.layer for norm in result.placed] == [norm.layer for norm in due.placed] == ["0", "2", "4", "6", "10"]
    assert result.model.state_dict().keys() == due.model.state_dict().keys()
    for key, value in due.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[key], value), key
    torch.testing.assert_close(result.model.eval()(x), due.model.eval()(x), atol=1e-5, rtol=1e-5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key][0]), key
        assert value.stride() == before[key][1], key
    old = result.convert_state_dict(model.state_dict())
    for key, value in due.convert_state_dict(plain.state_dict()).items():
        assert torch.equal(old[key], value), key


@pytest.mark.every(3)
@pytest.mark.parametrize("layout", DENSE)
def test_what_is_placed_trains_alike(layout: str) -> None:
    model, x = bare(layout), input_of(layout, batch=8)
    both = [place(model, x).model.train(), place(bare("contiguous"), x).model.train()]
    for one in both:
        one(x).square().sum().backward()
    for (name, p), (_, due) in zip(*(one.named_parameters() for one in both), strict=True):
        torch.testing.assert_close(p.grad, due.grad, atol=1e-3, rtol=1e-3, msg=name)
