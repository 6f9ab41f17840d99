from __future__ import annotations

import batchnorm


def spoil(norm) -> None:
    norm.running_mean.add_(norm.running_var.sqrt())


def test_frozen_by_the_library(net, found) -> None:
    spoil(net.bn2)
    batchnorm.freeze(net, "bn2")
    assert found(net) == [("frozen_wrong", "bn2")]


def test_frozen_by_hand_inside_a_model_in_training(net, found) -> None:
    spoil(net.bn3)
    net.train()
    net.bn3.eval()
    assert found(net) == [("frozen_wrong", "bn3")]


def test_frozen_at_its_initial_values(net, found) -> None:
    net.bn3.reset_running_stats()
    batchnorm.freeze(net, "bn3")
    assert found(net) == [("frozen_wrong", "bn3")]


def test_a_count_that_stopped(net, found) -> None:
    spoil(net.bn2)
    net.bn2.num_batches_tracked.fill_(50)
    assert found(net) == [("frozen_wrong", "bn2")]


def test_frozen_with_right_statistics_is_nothing(net, found) -> None:
    batchnorm.freeze(net, "bn2")
    assert found(net) == []
