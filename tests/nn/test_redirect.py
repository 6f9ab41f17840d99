"""Calls of norms redirected to replicas: the norm itself is the same before, while and after."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentTypeError, StateError, UnknownNameError
from batchnorm.nn.redirect import norms_for, original_of, overlooked, rule_of, set_aside, shallow_copy
from batchnorm.nn.redirect import redirected as redirection

redirected = contextmanager(redirection)
X = torch.arange(6.0).reshape(3, 2)


class Momentum:
    """A rule: calls run with another momentum, and it is noted when they have returned."""

    def __init__(self, momentum: float, axis: str = "update") -> None:
        self.momentum, self.axis = momentum, axis
        self.seen, self.returned = [], 0

    def require(self, others) -> None:
        if any(rule.momentum == self.momentum for rule in others):
            raise StateError("twice the same")

    def apply(self, norm, replica, inputs):
        self.seen.append((replica is not norm, sorted(inputs)))
        replica.__dict__["momentum"] = self.momentum
        return self._then

    def _then(self) -> None:
        self.returned += 1


def norm() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(2, momentum=0.0)


def test_a_call_runs_with_the_rules_settings_and_the_norm_keeps_its_own():
    one, rule = norm(), Momentum(1.0)
    before = dict(one.__dict__)
    with redirected({one: rule}):
        assert (rule_of(one, "update"), rule_of(one, "statistics")) == (rule, None)
        one(X)
        assert one.momentum == 0.0
    assert one.running_mean.tolist() == [2.0, 3.0]  # the replica shares the buffers
    assert rule.seen == [(True, ["input"])]
    assert rule.returned == 1
    assert one.__dict__ == before


def test_the_innermost_rule_of_an_axis_decides_unless_it_is_overlooked():
    one, outer, inner = norm(), Momentum(1.0), Momentum(0.5)
    with redirected({one: outer}), redirected({one: inner}):
        one(X)
        assert (len(outer.seen), len(inner.seen)) == (0, 1)
        with overlooked(one, "update"):
            one(X)
            assert rule_of(one, "update") is None
        with overlooked(one, "statistics"):
            one(X)
    assert (len(outer.seen), len(inner.seen), inner.returned) == (0, 2, 2)


def test_rules_of_both_axes_are_applied_statistics_first():
    one, update, statistics = norm(), Momentum(1.0), Momentum(0.5, "statistics")
    with redirected({one: update}), redirected({one: statistics}):
        one(X)
    assert one.running_mean.tolist() == [2.0, 3.0]  # the update's rule was applied last
    assert (update.returned, statistics.returned) == (1, 1)


def test_a_refused_block_and_one_that_raises_leave_nothing():
    one, two = norm(), norm()
    with redirected({one: Momentum(1.0)}):
        with pytest.raises(StateError, match="twice the same"), redirected({two: Momentum(1.0), one: Momentum(1.0)}):
            pass
        assert rule_of(two, "update") is None
    with pytest.raises(KeyError), redirected({one: Momentum(1.0)}):
        raise KeyError
    assert "forward" not in one.__dict__
    assert "forward" not in two.__dict__


def test_a_forward_of_the_instance_is_run_and_comes_back():
    one = norm()
    one.forward = nn.BatchNorm1d.forward.__get__(one)
    with redirected({one: Momentum(1.0)}):
        one(X)
    assert one.forward.__self__ is one
    assert one.running_mean.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_norm_follows_no_block(duplicate):
    one, rule = norm(), Momentum(1.0)
    with redirected({one: rule}):
        twin = duplicate(one)
        twin(X)
        assert "forward" not in twin.__dict__
    assert rule.seen == []
    assert twin.running_mean.tolist() == [0.0, 0.0]


def test_what_a_forward_notes_on_its_layer_is_noted_on_the_norm():
    class Notes(nn.BatchNorm1d):
        def forward(self, input):
            self.last = len(input)
            return super().forward(input)

    one = Notes(2)
    with redirected({one: Momentum(0.0)}):
        one(X)
    assert one.last == 3


def test_what_is_set_aside_counts_in_copies_that_know_their_originals():
    one = norm()
    replica = shallow_copy(one)
    assert replica.running_mean is one.running_mean
    set_aside(replica)
    set_aside(replica)  # a copy of a copy
    replica.momentum = 1.0
    replica(X)
    assert one.running_mean.tolist() == [0.0, 0.0]
    assert original_of(replica.running_mean) is one.running_mean
    assert original_of(one.running_mean) is None


def test_models_whose_norms_cannot_be_redirected_are_refused():
    def named(model, names=None):
        return norms_for("use", model, names, lambda norm: True)

    assert list(named(nn.Sequential(norm()))) == ["0"]
    with pytest.raises(ArgumentTypeError):
        named("no model")
    with pytest.raises(UnknownNameError):
        named(nn.Sequential(norm()), "strange")
    with pytest.raises(StateError, match="is DataParallel"):
        named(nn.DataParallel(norm()))
    wrapped = norm()
    wrapped.forward = lambda input: input
    with pytest.raises(StateError, match="replaced on the instance"):
        named(nn.Sequential(wrapped))
    with pytest.warns(UserWarning, match="holds no batch norm"):
        assert named(nn.Linear(1, 1)) == {}
