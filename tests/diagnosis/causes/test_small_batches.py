from __future__ import annotations

import copy

import torch
from torch import nn

import batchnorm


def trained_by(net: nn.Module, data: torch.Tensor, size: int) -> nn.Module:
    net = copy.deepcopy(net).train()
    with torch.no_grad():
        for batch in data.split(size):
            net(batch)
    return net.eval()


def test_training_batches_show_it(net, found, home) -> None:
    data = torch.cat(home)
    assert found(trained_by(net, data, 4), training_batches=list(data.split(4)))[0][0] == "small_batches"


def test_training_batches_of_usual_size_are_nothing(net, found, home) -> None:
    assert found(net, training_batches=home) == []


def test_small_batches_of_a_model_trained_on_large_ones_are_nothing(net, found, batches) -> None:
    assert found(net, list(torch.cat(batches).split(4))) == []


def test_every_norm_that_it_touches_is_named(net, batches, home) -> None:
    data = torch.cat(home)
    (finding,) = batchnorm.diagnose(trained_by(net, data, 2), batches, training_batches=list(data.split(2))).findings
    assert finding.layers == ("bn2", "bn3", "bn4")  # the first norm met what it always meets
