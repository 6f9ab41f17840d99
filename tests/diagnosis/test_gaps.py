from __future__ import annotations

import numpy
import torch
from torch import nn

import batchnorm
from batchnorm.diagnosis.distance import kl, squared_distance
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


def test_later_norms_are_measured_behind_population_statistics(net, batches) -> None:
    """What a norm is said to meet is what it meets in eval mode once all are recalibrated one after the other."""
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        norm.reset_running_stats()
    layers = batchnorm.diagnose(net, batches).layers
    data = torch.cat(batches)
    for name, layer in zip(("bn1", "bn2", "bn3", "bn4"), layers, strict=True):
        norm = net.get_submodule(name)
        met: list[torch.Tensor] = []
        handle = norm.register_forward_pre_hook(lambda module, args, met=met: met.append(args[0]))
        with torch.no_grad():
            net(data)
        handle.remove()
        moments = Moments.of(met[0])
        norm.running_mean.copy_(moments.mean)
        norm.running_var.copy_(moments.variance(correction=1))
        # batches instead of one, and float32 buffers: roundings
        distance = squared_distance(*layer.measured, moments.mean, moments.variance(correction=1), layer.eps)
        assert float(distance.mean().sqrt()) < 1e-5


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


def test_a_model_that_never_gives_the_same_twice_is_measured_on_batch_statistics() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.from_numpy(numpy.random.default_rng().normal(size=tuple(x.shape))).to(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), Noisy(), nn.BatchNorm1d(4)).eval()
    batches = list(torch.randn(8, 64, 4))
    layers = batchnorm.diagnose(model, batches).layers
    # x + noise of variance 1
    torch.testing.assert_close(layers[1].measured[1], torch.full((4,), 2.0).double(), rtol=0.2, atol=0.0)


def test_distance_is_symmetric_and_infinite_where_something_is_broken() -> None:
    a, b = (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])), (torch.tensor([1.0, 1.0]), torch.tensor([4.0, 2.0]))
    assert torch.equal(squared_distance(*a, *b, 0.0), squared_distance(*b, *a, 0.0))
    # (0 − 1)²/2.5 + (½ log ¼)²
    expected = 1 / 2.5 + (0.5 * torch.tensor(0.25).log()) ** 2
    torch.testing.assert_close(squared_distance(*a, *b, 0.0)[0], expected)
    assert squared_distance(*a, *b, 0.0)[1] == 0
    for broken in (torch.nan, torch.inf, -1.0):
        variance = torch.tensor([1.0, broken])
        assert torch.isinf(squared_distance(a[0], variance, *b, 1e-5)[1])
