"""Recalibration of models and on batches that lie in memory in every way that a tensor can."""

import copy

import pytest
import torch
from tests.layouts import DENSE, LAYOUTS, input_of, model_of
from torch import nn

from batchnorm import merge, recalibrate, update_bn
from batchnorm.errors import StateError
from batchnorm.statistics import Population


def batches_of(layout):
    return [input_of(layout, seed=seed) for seed in range(3)]


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.every(4)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("norm", ["torch", "ours"])
def test_models_are_measured_and_put_back(layout, norm, tmp_path):
    model, plain = model_of(layout, norm=norm), model_of("contiguous", norm=norm)
    before, strides = state_of(model), {key: value.stride() for key, value in model.state_dict().items()}
    result = recalibrate(model, batches_of("contiguous"))
    recalibrate(plain, batches_of("contiguous"))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    assert {key: value.stride() for key, value in model.state_dict().items()} == strides
    path = result.population.save(tmp_path / "population.safetensors")
    loaded = Population.load(path).layers
    for name, layer in result.population.layers.items():
        assert torch.equal(loaded[name].moments.mean, layer.moments.mean)
    result.undo()
    assert same(state_of(model), before)


@pytest.mark.every(6)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"order": "parallel"}, {"memory": 4000}, {"memory": 4000, "cache": True}], ids=str)
def test_batches_of_every_layout_give_what_their_values_give(layout, options, tmp_path):
    if options.get("cache"):
        options = options | {"cache": str(tmp_path)}
    model, plain = model_of("channels_last"), model_of("channels_last")
    batches = batches_of(layout)
    result = recalibrate(model, batches, **options)
    recalibrate(plain, [batch.clone(memory_format=torch.contiguous_format) for batch in batches], **options)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-5, rtol=1e-5)
    result.undo()
    assert same(state_of(model), state_of(model_of("channels_last")))


@pytest.mark.parametrize(
    "verb", [recalibrate, lambda model, batches: update_bn(batches, model)], ids=["recalibrate", "update_bn"]
)
def test_expanded_statistics_cannot_be_written(verb):
    model = model_of("expanded", which="buffers")
    before = state_of(model)
    with pytest.raises(StateError, match=r"1\.running_mean is one value, expanded to 4 channels"):
        verb(model, batches_of("contiguous"))
    assert same(state_of(model), before)


def test_statistics_that_begin_at_one_address_are_told_apart():
    both = torch.zeros(3, 3)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    model[0].running_mean, model[1].running_mean = both[0], both[:, 0]
    result = recalibrate(model, [torch.randn(16, 3, generator=torch.Generator().manual_seed(0))])
    assert set(result.population.layers) == {"0", "1"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_models(layout):
    one, other = model_of(layout), model_of("contiguous")
    plain = copy.deepcopy(other)
    plain.load_state_dict(one.state_dict())
    merged, expected = (merge([m, other]).model.state_dict() for m in (one, plain))
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value)
