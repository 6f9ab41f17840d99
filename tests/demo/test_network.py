"""The paper's network: same weights with and without norm."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.demo.network import hidden_inputs, sigmoid_network


def test_weights_are_the_same_with_and_without_norm():
    plain, normed = sigmoid_network(64, norm=False, seed=3), sigmoid_network(64, norm=True, seed=3)
    linear = [[layer for layer in network if isinstance(layer, nn.Linear)] for network in (plain, normed)]
    assert len(linear[0]) == len(linear[1]) == 4
    for a, b in zip(*linear, strict=True):
        assert torch.equal(a.weight, b.weight)
    assert [layer.bias is None for layer in linear[1]] == [True, True, True, False]
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in normed) == 3


def test_hidden_inputs_are_what_enters_the_sigmoids():
    network = sigmoid_network(64, norm=True).eval()
    x = torch.randn(5, 1, 8, 8)
    seen: list[torch.Tensor] = []
    for layer in network:
        if isinstance(layer, nn.Sigmoid):
            layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    network(x)
    assert [s.shape for s in seen] == [(5, 100)] * 3
    for got, expected in zip(hidden_inputs(network, x), seen[:3], strict=True):
        assert torch.equal(got, expected)
