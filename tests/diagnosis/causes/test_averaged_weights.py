from __future__ import annotations

import copy

import torch
from torch.optim.swa_utils import AveragedModel


def others(net, count: int) -> list:
    g = torch.Generator().manual_seed(0)
    models = []
    for _ in range(count):
        model = copy.deepcopy(net)
        with torch.no_grad():
            for layer in (model.conv1, model.conv2, model.fc3, model.fc4):
                layer.weight.add_(0.7 * layer.weight.std() * torch.randn(layer.weight.shape, generator=g))
        models.append(model)
    return models


def test_an_averaged_model_counts(net, found) -> None:
    average = AveragedModel(net)
    for model in others(net, 3):
        average.update_parameters(model)
    assert found(average.eval())[0][0] == "averaged_weights"


def test_variances_that_shrank_throughout(net, found, home) -> None:
    models = others(net, 4)
    for model in models:
        model.train()
        for _ in range(14):
            for batch in home:
                with torch.no_grad():
                    model(batch)
    states = [model.state_dict() for model in models]
    mean = {key: sum(state[key].double() for state in states).div(4).to(states[0][key].dtype) for key in states[0]}
    net.load_state_dict(mean)
    assert found(net)[0][0] == "averaged_weights"


def test_an_averaged_and_recalibrated_model_is_healthy(net, found, home) -> None:
    import batchnorm

    average = AveragedModel(net).eval()
    for model in others(net, 3):
        average.update_parameters(model)
    batchnorm.recalibrate(average, home)
    assert found(average) == []


def test_other_weights_are_no_average_though_variances_shrank(net, found) -> None:
    with torch.no_grad():
        for layer in (net.conv1, net.conv2, net.fc3, net.fc4):
            layer.weight.mul_(0.8)
            layer.weight.add_(0.4 * layer.weight.std() * torch.randn(layer.weight.shape))
    assert found(net)[0][0] == "stale"
