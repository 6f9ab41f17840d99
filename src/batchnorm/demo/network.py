"""The network of the paper's first experiment."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.nn.batch_norm import BatchNorm1d

__all__ = ["HIDDEN", "hidden_inputs", "sigmoid_network"]

HIDDEN = 100
LAYERS = 3


def sigmoid_network(pixels: int, *, norm: bool, seed: int = 0, std: float = 0.1) -> nn.Sequential:
    """Return three hidden layers of 100 sigmoid units and a linear classifier of 10 classes.

    With ``norm``, each hidden layer is linear → norm → sigmoid, and its linear part has no bias, which the norm would
    cancel. The weights are small random Gaussians, the same ones with and without norm for the same seed.

    Source: Ioffe & Szegedy 2015, §4.1 (arXiv 1502.03167).
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    features = pixels
    for _ in range(LAYERS):
        layers.append(nn.Linear(features, HIDDEN, bias=not norm))
        if norm:
            layers.append(BatchNorm1d(HIDDEN))
        layers.append(nn.Sigmoid())
        features = HIDDEN
    layers.append(nn.Linear(features, 10))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def hidden_inputs(network: nn.Sequential, images: torch.Tensor) -> list[torch.Tensor]:
    """Return what enters the sigmoid of each hidden layer, (N, 100) each, first layer first."""
    seen = []
    x = images
    for layer in network:
        if isinstance(layer, nn.Sigmoid):
            seen.append(x)
        x = layer(x)
    return seen
