"""Models that fold, or do not, for the tests of this folder and of those below it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Drawn", "Standardized", "generator", "lively", "randn"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def lively(model, seed=0):
    """Give every norm statistics and parameters of its own: γ of either sign and 0, means far from 0."""
    rng = generator(seed)
    model = model.double().eval()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=rng))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=rng) * 3 + 0.1)
            if norm.weight is not None:
                with torch.no_grad():
                    norm.weight.copy_(torch.randn(norm.num_features, generator=rng))
                    norm.weight[0] = 0.0
                    norm.bias.copy_(torch.randn(norm.num_features, generator=rng))
    return model


class Standardized(nn.Conv2d):
    """A convolution that computes its weight from its own parameter."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Drawn(nn.Conv2d):
    """Its weight depends on the input."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * x.mean(), self.bias)
