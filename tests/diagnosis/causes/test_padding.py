from __future__ import annotations

import copy

import torch


def test_padding_in_the_training_only(net, found, home) -> None:
    model = copy.deepcopy(net).train()
    with torch.no_grad():
        for _ in range(14):
            for batch in home:
                model(torch.cat([batch, torch.zeros_like(batch)]))
    assert found(model.eval())[0] == ("padding", "bn1")


def test_padding_in_these_batches_only(net, found, batches) -> None:
    padded = [torch.cat([batch, torch.zeros_like(batch)]) for batch in batches]
    assert found(net, padded)[0] == ("padding", "bn1")


def test_constant_batches(net, found, batches) -> None:
    assert found(net, [torch.full_like(batch, 0.3) for batch in batches])[0] == ("padding", "bn1")


def test_another_contrast_is_no_padding(net, found, batches) -> None:
    assert found(net, [0.4 * batch for batch in batches])[0][0] == "domain_shift"


def test_weights_of_another_scale_are_no_padding(net, found, home) -> None:
    with torch.no_grad():
        net.conv1.weight.mul_(1.5)
    assert found(net, training_batches=home)[0] == ("stale", "bn1")
    # without training batches the same answer may come from another contrast
    assert found(net)[0][0] in ("stale", "domain_shift")
