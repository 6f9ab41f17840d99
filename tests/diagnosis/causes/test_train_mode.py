from __future__ import annotations

from torch import nn
from torch.nn import functional as F


def test_a_norm_left_in_train_mode(net, found) -> None:
    net.bn3.train()
    assert found(net) == [("train_mode", "bn3")]


def test_a_norm_without_running_statistics(net, found) -> None:
    bare = nn.BatchNorm1d(32, track_running_stats=False)
    bare.load_state_dict(dict(net.bn3.named_parameters()))
    net.bn3 = bare.eval()
    assert found(net)[0] == ("train_mode", "bn3")


def test_a_functional_norm_that_always_trains(net, found) -> None:
    class Always(nn.Module):
        def __init__(self, norm: nn.BatchNorm1d) -> None:
            super().__init__()
            self.register_buffer("running_mean", norm.running_mean.clone())
            self.register_buffer("running_var", norm.running_var.clone())

        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    net.bn3 = Always(net.bn3).eval()
    assert found(net)[0] == ("train_mode", "bn3")


def test_a_model_in_train_mode_is_one_that_its_user_is_training(net, found) -> None:
    assert found(net.train()) == []
