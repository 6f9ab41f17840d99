"""A plan as data: its layers in order, and what one of several runs shows of it."""

from __future__ import annotations

import dataclasses

import pytest
from tests.folding.lively_models import lively, randn
from torch import nn

from batchnorm.dataflow.trace import trace
from batchnorm.folding.planning.make_plan import make_plan
from batchnorm.folding.planning.plan import FoldPlan, Options
from batchnorm.models.several import Several


class Net(nn.Module):
    """Takes the way over ``second`` too, where the batch is larger than one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.first(x)
        y = self.bn(y + self.second(x) if len(x) > 1 else y)
        return self.last(y.tanh()).tanh()


@pytest.fixture(scope="module")
def plan() -> FoldPlan:
    model = lively(Net())
    runs = Several((randn(1, 4, 5, 5), randn(2, 4, 5, 5)), ("one", "two"))
    return make_plan(model, trace(model, runs), Options())


def test_layers_stand_once_and_in_the_order_of_execution(plan: FoldPlan) -> None:
    (step,) = plan.steps
    assert [layer.name for layer in step.into] == ["first", "second"]
    assert [len(layer.calls) for layer in step.into] == [2, 1]
    assert step.parts == [step.back]


@pytest.mark.parametrize(("run", "into"), [(0, ["first"]), (1, ["first", "second"])])
def test_of_one_run_only_its_own_calls_are_left(plan: FoldPlan, run: int, into: list[str]) -> None:
    one = plan.of_run(run)
    (step,) = one.steps
    assert [layer.name for layer in step.into] == into
    calls = [*step.use.calls, *(call for layer in step.into for call in layer.calls), *one.graph.calls, *one.gone]
    calls += [call for norm in one.staying for call in norm.obstacles]
    assert {call.run for call in calls} == {run}
    assert {value.producer.run for value in step.crossed} == {run}
    assert one.order == plan.order


def test_a_norm_that_a_run_does_not_reach_keeps_what_all_show(plan: FoldPlan) -> None:
    assert plan.steps[0].of_run(7) is plan.steps[0]


def test_a_plan_is_not_changed_afterwards(plan: FoldPlan) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.staying = ()
    assert plan.changes
    assert not dataclasses.replace(plan, steps=()).changes
