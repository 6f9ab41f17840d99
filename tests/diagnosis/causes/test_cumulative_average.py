from __future__ import annotations

import pytest
import torch
from tests.diagnosis.conftest import settle


def norms_of(net) -> list:
    return [net.bn1, net.bn2, net.bn3, net.bn4]


@pytest.mark.parametrize("names", [("bn1",), ("bn3",), ("bn1", "bn2", "bn3", "bn4")])
def test_weights_that_moved_under_a_cumulative_average(net, found, names) -> None:
    for name in names:
        norm = net.get_submodule(name)
        norm.momentum = None
        norm.reset_running_stats()
        feeder = net.get_submodule(name.replace("bn", "conv" if name in ("bn1", "bn2") else "fc"))
        with torch.no_grad():
            feeder.weight.mul_(4)
        settle(net)
        with torch.no_grad():
            feeder.weight.div_(4)
    settle(net, steps=60)
    assert found(net)[0] == ("cumulative_average", names[0])


def test_a_cumulative_average_of_weights_that_stood_still_is_nothing(net, found) -> None:
    for norm in norms_of(net):
        norm.momentum = None
        norm.reset_running_stats()
    assert found(settle(net, steps=20)) == []
