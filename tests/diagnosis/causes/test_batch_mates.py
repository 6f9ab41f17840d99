from __future__ import annotations

import torch
from torch import nn


class Mixed(nn.Module):
    def forward(self, x):
        return x - 0.5 * x.mean(0, keepdim=True)


class Sorted(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


def test_the_module_in_which_samples_see_each_other(net, found) -> None:
    net.fc4 = nn.Sequential(Mixed(), net.fc4)
    assert found(net)[0] == ("batch_mates", "fc4.0")


def test_a_normalization_within_each_sample_is_none(net, found) -> None:
    net.head = nn.Sequential(Sorted(), net.head)
    assert found(net) == []


def test_a_model_that_draws_random_numbers_is_none(net, found) -> None:
    class Noisy(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    net.head = nn.Sequential(Noisy(), net.head)
    assert found(net) == []
