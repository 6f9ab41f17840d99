from __future__ import annotations

import pytest
import torch


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("buffer", "value"),
    [
        ("running_mean", torch.nan),
        ("running_mean", torch.inf),
        ("running_var", torch.inf),
        ("running_var", -0.01),
        ("running_var", 0.0),
        ("running_var", 1e30),
    ],
)
def test_one_channel_that_no_data_can_give(net, found, buffer: str, value: float) -> None:
    getattr(net.bn2, buffer)[3] = value
    assert found(net) == [("poisoned", "bn2")]


def test_statistics_that_are_only_wrong_are_not_poisoned(net, found) -> None:
    net.bn2.running_var.mul_(30.0)
    assert found(net) == [("stale", "bn2")]
