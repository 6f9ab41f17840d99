"""The change of the input that is fitted to the first norm's statistics."""

from __future__ import annotations

import pytest
import torch

from batchnorm.diagnosis.gaps import measure
from batchnorm.diagnosis.passes import Passes
from batchnorm.diagnosis.sites import EverySite
from batchnorm.diagnosis.stem import InputChange, explain
from batchnorm.models.calling import call_on_batch


def explained(net, batches) -> InputChange | None:
    passes = Passes(net, EverySite(net), batches, call_on_batch)
    return explain(passes, measure(passes).layers[0])


def test_contrast_and_brightness_are_those_of_the_training(net, batches) -> None:
    """These are (x − 1) / 2 of the training's x: its x is twice these, and one more."""
    change = explained(net, [(batch - 1) / 2 for batch in batches])
    # not quite, as the zeros that the convolution pads with stay zeros
    assert change.contrast == pytest.approx(2.0, rel=0.05)
    assert change.brightness == pytest.approx([1.0, 1.0, 1.0], abs=0.1)
    assert change.noise < 0.1
    assert change.left < 0.05


def test_noise_has_its_standard_deviation(net, batches) -> None:
    g = torch.Generator().manual_seed(0)
    change = explained(net, [batch + 2.0 * torch.randn(batch.shape, generator=g) for batch in batches])
    assert change.noise == pytest.approx(2.0, rel=0.1)
    assert change.left < 0.1


def test_other_weights_are_left_unexplained(net, batches) -> None:
    with torch.no_grad():
        net.conv1.weight.copy_(net.conv1.weight.flip(0))
    assert explained(net, batches).left > 0.4


def test_inputs_that_are_no_numbers_have_no_contrast() -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.BatchNorm1d(4)).eval()
    assert explained(net, [torch.randint(0, 10, (64,)) for _ in range(4)]) is None
