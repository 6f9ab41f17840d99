from __future__ import annotations

import pytest
import torch


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1.5, lambda x: 0.3 * x, lambda x: 2 * x - 1, lambda x: -x],
    ids=["brighter", "less contrast", "both", "inverted"],
)
def test_a_change_of_the_input_is_told_without_training_batches(net, found, batches, change) -> None:
    assert found(net, [change(batch) for batch in batches])[0] == ("domain_shift", "bn1")


def test_noise(net, found, batches) -> None:
    g = torch.Generator().manual_seed(0)
    noisy = [batch + 1.5 * torch.randn(batch.shape, generator=g) for batch in batches]
    assert found(net, noisy)[0] == ("domain_shift", "bn1")


def test_any_shift_is_told_beside_training_batches(net, found, batches, home) -> None:
    strange = [batch.abs().flip(2) for batch in batches]
    assert found(net, strange, training_batches=home)[0] == ("domain_shift", "bn1")


def test_other_weights_are_no_shift(net, found, home) -> None:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        net.conv1.weight.copy_(net.conv1.weight.std() * torch.randn(net.conv1.weight.shape, generator=g))
    assert found(net)[0] == ("stale", "bn1")
    assert found(net, training_batches=home)[0] == ("stale", "bn1")
