from __future__ import annotations

import pytest


@pytest.mark.parametrize("power", [1, -1])
def test_every_variance_off_by_the_factor_of_small_batches(net, found, power: int) -> None:
    for norm, positions in ((net.bn1, 64), (net.bn2, 9), (net.bn3, 1), (net.bn4, 1)):
        m = 2 * positions
        norm.running_var.mul_(((m - 1) / m) ** power)
    assert found(net) == [("biased_variance", "bn2")]


def test_a_factor_that_no_batch_size_gives(net, found) -> None:
    net.bn1.running_var.mul_(0.4)
    assert found(net) != [("biased_variance", "bn1")]
