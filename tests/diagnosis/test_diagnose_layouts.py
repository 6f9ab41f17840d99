"""Models and batches that lie in memory in every way that a tensor can are told what their values are told."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.layouts import DENSE, LAYOUTS, input_of, lay_out, model_of
from torch import nn

from batchnorm import diagnose
from batchnorm.diagnosis import DiagnoseResult
from batchnorm.errors import StateError

EVERY = [
    *((layout, "both") for layout in DENSE),
    *(
        (layout, which)
        for layout in LAYOUTS
        for which in ("parameters", "buffers")
        if (layout, which) != ("expanded", "buffers")
    ),
]


def told(result: DiagnoseResult) -> list[tuple[object, ...]]:
    return [(one.cause, one.severity, one.layers, one.cure) for one in (*result.findings, *result.notes)]


def assert_same(one: DiagnoseResult, other: DiagnoseResult) -> None:
    assert told(one) == told(other)
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    for a, b in zip(one.layers, other.layers, strict=True):
        for pair, due in ((a.stored, b.stored), (a.measured, b.measured), (a.deployed, b.deployed)):
            torch.testing.assert_close(pair, due, atol=1e-4, rtol=1e-4)


@pytest.mark.every(7)
@pytest.mark.parametrize(("layout", "which"), EVERY)
def test_models_are_diagnosed_by_their_values_and_left_as_they_are(layout: str, which: str) -> None:
    model = model_of(layout, which=which)
    plain = lay_out(copy.deepcopy(model), LAYOUTS["contiguous"])
    before = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    batches = [input_of("contiguous", batch=16, seed=seed) for seed in range(4)]
    assert_same(diagnose(model, batches), diagnose(plain, batches))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key][0]), key
        assert value.stride() == before[key][1], key


def test_expanded_statistics_are_refused_by_name() -> None:
    model = model_of("expanded", which="buffers")
    with pytest.raises(StateError, match=r"1\.running_mean is one value, expanded to 4 channels"):
        diagnose(model, [input_of("contiguous", seed=seed) for seed in range(2)])


@pytest.mark.every(8)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["torch", "ours"])
def test_batches_are_diagnosed_by_their_values(layout: str, norm: str) -> None:
    model = model_of("channels_last", norm=norm)
    batches = [input_of(layout, batch=16, seed=seed) for seed in range(4)]
    plain = [batch.clone(memory_format=torch.contiguous_format) for batch in batches]
    before = [batch.clone() for batch in batches]
    assert_same(diagnose(model, batches, training_batches=batches), diagnose(model, plain, training_batches=plain))
    assert all(map(torch.equal, batches, before))


@pytest.mark.every(3)
@pytest.mark.parametrize("layout", DENSE)
def test_inputs_that_are_changed_for_a_trial_keep_their_values(layout: str) -> None:
    """A missing /255 is looked for by inputs that are made from the batches: these are not written."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    pictures = [torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    model.train().requires_grad_(False)
    for picture in pictures * 20:
        model(picture)
    batches = [LAYOUTS[layout](255 * picture) for picture in pictures]
    (finding,) = diagnose(model.eval(), batches).findings
    assert finding.cause == "input_preparation"
    assert all(torch.equal(batch, 255 * picture) for batch, picture in zip(batches, pictures, strict=True))
