"""Which running statistics are measured, which are left and why, and by which buffer each is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import StateError, UnknownNameError
from batchnorm.statistics.sites import NothingToMeasure, Sites, has_loose_pair


class Loose(nn.Module):
    """Buffers for a functional norm, with a counter and a table that are no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        for name in ("running_mean", "running_var", "other_running_mean", "other_running_var"):
            self.register_buffer(name, torch.zeros(3))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.zeros(7))


def reasons(sites: Sites) -> dict[str, str]:
    return {left.name: left.reason for left in sites.left.values()}


def test_norms_are_known_by_their_memory_whoever_hands_it_on():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    sites = Sites(net, ["0", "1"])
    (site,) = sites.known
    assert (site.name, site.address) == ("0", ("0", "0", ("running_mean", "running_var", "num_batches_tracked")))
    assert sites.find(net[0].running_mean.detach(), net[0].running_var) is site
    assert sites.find(None, None) is None
    assert reasons(sites) == {"1": "keeps no running statistics (track_running_stats=False)"}


def test_frozen_norms_are_left_unless_they_are_named():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)).train()
    batchnorm.freeze(net, names="0")
    net[1].eval()
    sites = Sites(net, None)
    assert [site.name for site in sites.known] == ["2"]
    assert reasons(sites) == {"0": "frozen", "1": "frozen by hand: in eval mode inside a model in train mode"}
    assert sites.find(net[0].running_mean, net[0].running_var) is None
    assert [site.name for site in Sites(net, ["0", "1"]).known] == ["0", "1"]


def test_loose_buffers_become_a_site_when_a_function_is_given_them():
    net = Loose()
    sites = Sites(net, None)
    assert [site.name for site in sites.known] == ["norm"]
    other = sites.find(net.other_running_mean, net.other_running_var)
    assert (other.name, other.keys) == ("other", ("other_running_mean", "other_running_var", None))
    own = sites.find(net.running_mean, net.running_var)
    assert own.keys == ("running_mean", "running_var", "num_batches_tracked")
    assert sites.find(net.other_running_mean, net.other_running_var) is other
    assert sites.names_of_loose() == [
        "running_mean", "running_var", "other_running_mean", "other_running_var", "table"
    ]  # fmt: skip


def test_loose_buffers_of_a_module_in_eval_mode_by_hand_are_left():
    net = nn.Sequential(Loose(), nn.BatchNorm1d(3)).train()
    net[0].eval()
    sites = Sites(net, None)
    assert sites.names_of_loose() == []
    assert sites.find(net[0].other_running_mean, net[0].other_running_var) is None
    assert "frozen by hand" in reasons(sites)["0.other"]


def test_calls_with_buffers_of_nobody_are_counted():
    sites = Sites(Loose(), None)
    assert sites.find(torch.zeros(3), torch.ones(3)) is None
    assert sites.unknown_calls == 1


def test_names_choose_among_norms_and_loose_buffers():
    net = Loose()
    sites = Sites(net, "other")
    assert sites.known == []
    assert sites.find(net.running_mean, net.running_var) is None
    assert sites.find(net.other_running_mean, net.other_running_var).name == "other"
    with pytest.raises(UnknownNameError):
        Sites(net, "strange")


def test_nothing_to_measure_is_refused_and_says_why():
    with pytest.raises(NothingToMeasure, match="holds no batch norm with running statistics"):
        Sites(nn.Linear(2, 2), None)
    net = nn.Sequential(nn.BatchNorm1d(3))
    batchnorm.freeze(net)
    with pytest.raises(NothingToMeasure, match=r"none of the norms can be recalibrated \(0: frozen\)"):
        Sites(net, None)
    assert Sites(net, None, may_be_none=True).known == []


def test_lazy_norms_and_shared_memory_are_refused():
    with pytest.raises(StateError, match=r"0\.weight has no size yet"):
        Sites(nn.Sequential(nn.LazyBatchNorm1d()), None)
    net = nn.Sequential(nn.BatchNorm1d(3))
    net[0].running_mean = torch.zeros(1).expand(3)
    with pytest.raises(StateError, match=r"0\.running_mean is one value, expanded to 3 channels"):
        Sites(net, None)


def test_an_address_of_another_process_is_found_or_refused():
    net = Loose()
    found = Sites(net, None).find(net.other_running_mean, net.other_running_var)
    twin = Loose()
    sites = Sites(twin, None)
    site = sites.at(found.address)
    assert site.running_mean is twin.other_running_mean
    assert sites.at(found.address) is site
    with pytest.raises(StateError, match="another process measured gone"):
        sites.at(("gone", "gone", found.keys))


def test_a_pair_of_buffers_is_two_of_one_size_in_one_module():
    assert has_loose_pair(Loose())
    apart = nn.Sequential(nn.Module(), nn.Module(), nn.BatchNorm1d(3))
    for module in apart[:2]:
        module.register_buffer("one", torch.zeros(3))
    assert not has_loose_pair(apart)
