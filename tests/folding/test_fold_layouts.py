"""Models whose parameters, buffers and inputs lie in memory in every way that a tensor can."""

import copy

import pytest
import torch
from tests.layouts import DENSE, LAYOUTS, input_of, model_of
from torch import nn

from batchnorm import fold, refold, unfold
from batchnorm.folding.writing.record import digest

EVERY = [
    *((layout, which, 2, 4) for layout in LAYOUTS for which in ("parameters", "buffers")),
    *((layout, "both", dim, channels) for layout in DENSE for dim, channels in ((2, 1), (3, 4))),
]


@pytest.mark.every(6)
@pytest.mark.parametrize(("layout", "which", "dim", "channels"), EVERY)
def test_folding_and_all_ways_back(layout, which, dim, channels, tmp_path):
    model = model_of(layout, which=which, dim=dim, channels=channels)
    before = copy.deepcopy(model.state_dict())
    x = input_of("contiguous", dim=dim, channels=channels)
    result = fold(model, x, inplace=True)
    assert len(result.left) <= 1
    path = result.save_pairs(tmp_path / "pairs.safetensors")
    for pairs in (result.pairs, path):
        original = unfold(result.model, pairs)
        assert original.state_dict().keys() == before.keys()
        for key, value in original.state_dict().items():
            assert torch.equal(value, before[key]), key
        again = refold(original, pairs)
        again.load_state_dict(result.model.state_dict())
        torch.testing.assert_close(again(x), result.model(x))
    torch.testing.assert_close(unfold(result.model, path)(x), result.model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.every(2)
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
@pytest.mark.parametrize("dim", [2, 3])
def test_folded_weights_keep_their_layout(layout, dim):
    model = model_of(layout, dim=dim)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    folded = fold(model, input_of(layout, dim=dim)).model
    kept = [name for name, p in folded.named_parameters() if p.dim() > 2 and p.stride() == strides[name]]
    assert len(kept) == 4


@pytest.mark.every(3)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_options(layout):
    model, x = model_of("channels_last"), input_of(layout)
    mean, std = [0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]
    result = fold(model, x, fuse=True, borders=True, input_mean=mean, input_std=std)
    normalized = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(result.model(x), model(normalized), atol=1e-4, rtol=1e-4)


@pytest.mark.every(2)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every second", "odd strides"])
def test_exported_programs(layout):
    model, x = model_of(layout), input_of(layout)
    result = fold(torch.export.export(model, (x,)))
    assert len(result.left) <= 1
    torch.testing.assert_close(result.model.module()(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_digest_tells_values_and_types_apart_and_not_layouts():
    kernel = torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    digests = {digest(layout(kernel)) for layout in DENSE.values()}
    assert digests == {digest(nn.Parameter(kernel))}
    assert digest(kernel.double()) not in digests
    assert digest(-kernel) not in digests
    assert digest(torch.tensor(1)) != digest(torch.tensor(2))
