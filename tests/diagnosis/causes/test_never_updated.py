from __future__ import annotations

import torch


def test_one_layer(net, found) -> None:
    net.bn4.reset_running_stats()
    assert found(net) == [("never_updated", "bn4")]


def test_all_layers_are_one_finding_at_the_first(net, found) -> None:
    for norm in (net.bn1, net.bn2, net.bn3, net.bn4):
        norm.reset_running_stats()
    assert found(net) == [("never_updated", "bn1")]


def test_initial_values_behind_a_count_that_was_loaded(net, found) -> None:
    net.bn2.running_mean.zero_()
    net.bn2.running_var.fill_(1.0)
    assert found(net) == [("never_updated", "bn2")]


def test_a_count_of_zero_behind_right_statistics_is_nothing(net, found) -> None:
    net.bn2.num_batches_tracked.zero_()
    assert torch.any(net.bn2.running_mean != 0)
    assert found(net) == []
