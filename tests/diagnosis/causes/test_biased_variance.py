from __future__ import annotations

import pytest


@pytest.mark.parametrize("power", [1, -1])
def test_every_variance_off_by_the_factor_of_small_batches(net, found, power: int) -> None:
    for norm, positions in ((net.bn1, 64), (net.bn2, 9), (net.bn3, 1), (net.bn4, 1)):
        m = 2 * positions
        norm.running_var.mul_(((m - 1) / m) ** power)
    assert found(net) == [("biased_variance", "bn1")]


def test_a_factor_that_no_batch_size_gives(net, found) -> None:
    net.bn1.running_var.mul_(0.4)
    assert found(net) != [("biased_variance", "bn1")]


def test_the_factor_of_single_pictures(net, found) -> None:
    for norm, positions in ((net.bn1, 64), (net.bn2, 9)):
        norm.running_var.mul_((positions - 1) / positions)
    assert found(net) == []  # an eighth at most: too little to be called wrong
    net.bn2.running_var.mul_((8 / 9) ** 3)
    assert found(net)[0][0] != "biased_variance"  # no batch size gives this together with the other


def test_means_that_moved_too_are_of_other_weights(net, found) -> None:
    for norm in (net.bn3, net.bn4):
        norm.running_var.mul_(0.5)
        norm.running_mean.add_(0.5 * norm.running_var.sqrt())
    assert found(net)[0][0] != "biased_variance"
