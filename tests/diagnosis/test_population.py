"""What a norm is said to meet is what it meets once every norm before it holds its population statistics."""

from __future__ import annotations

import numpy
import torch
from torch import nn

import batchnorm
from batchnorm.diagnosis.distance import squared_distance
from batchnorm.moments import Moments


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
