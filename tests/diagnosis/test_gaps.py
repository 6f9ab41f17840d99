from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.diagnosis.distance import kl
from batchnorm.moments import Moments


def test_the_first_norm_is_measured_exactly(net, batches) -> None:
    layer = batchnorm.diagnose(net, batches).layers[0]
    with torch.no_grad():
        met = Moments.of(net.conv1(torch.cat(batches)))
    # the same float32 values in other batches: a convolution may round them otherwise, 2⁻²⁴ of terms that add up to |x|
    torch.testing.assert_close(layer.measured[0], met.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.measured[1], met.variance(correction=1), rtol=1e-5, atol=1e-6)
    stored = layer.stored[0], layer.stored[1]
    torch.testing.assert_close(layer.kl, kl(*layer.measured, *stored, layer.eps))


@pytest.mark.sweep
def test_a_deep_chain_that_amplifies_errors_stays_in_bounds() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU()) for _ in range(40)]
    model = nn.Sequential(*layers)
    data = torch.randn(40, 16, 24)
    with torch.no_grad():
        for batch in data:
            model(batch)
    result = batchnorm.diagnose(model.eval(), list(data[:6]))
    assert all(torch.isfinite(layer.measured[1]).all() for layer in result.layers)


def test_in_a_deep_chain_only_the_faulty_norm_has_a_gap() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU()) for _ in range(40))).eval()
    batches = list(torch.randn(8, 32, 24))
    batchnorm.recalibrate(model, batches)
    model[20][1].running_var.mul_(3.0)
    result = batchnorm.diagnose(model, batches)
    off = [layer.name for layer in result.layers if layer.distance > 1e-5]
    assert off == ["20.1"]
    assert all(layer.deployed_distance > 0.1 for layer in result.layers[20:])
