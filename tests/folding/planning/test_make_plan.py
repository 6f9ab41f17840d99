"""Which norms of a model can go: the stages, the reasons, and what is asked for to stay."""

from __future__ import annotations

import pytest
import torch
from tests.folding.lively_models import lively, randn
from tests.wired import Wired
from torch import nn

from batchnorm.dataflow.trace import trace
from batchnorm.folding.planning.make_plan import make_plan
from batchnorm.folding.planning.plan import FoldPlan, Options

X = randn(2, 4, 6, 6)


def plan_of(model: nn.Module, options: Options | None = None, **more) -> FoldPlan:
    model = lively(model)
    return make_plan(model, trace(model, X), options or Options(), **more)


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4)
    )


def branches() -> nn.Module:
    return Wired(lambda m, x: torch.tanh(m.conv(x) + m.bn(x)), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))


def shared() -> nn.Module:
    layers = {"a": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 4, 1), "c": nn.Conv2d(4, 4, 1)}

    def run(m, x):
        y = m.a(x)
        return torch.tanh(m.b(m.bn(y)).relu() + m.c(y)), m.bn(y).tanh()

    return Wired(run, **layers)


def recoverable(model: nn.Module) -> nn.Module:
    """Let γ be large beside β, and not 0."""
    model.bn.weight.data.fill_(1.0)
    return model


def test_norms_are_absorbed_one_after_the_other_and_what_stays_says_why() -> None:
    plan = plan_of(chain())
    assert [(step.name, [layer.name for layer in step.into]) for step in plan.steps] == [("1", ["0"]), ("3", ["2"])]
    (staying,) = plan.staying
    assert staying.name == "5"
    assert staying.reason.startswith(
        "It reads the output of tanh in 4, which is no linear operator. Nor can it go on: "
    )
    assert [call.name for call in staying.obstacles] == ["tanh"]
    assert plan.order == {"1": 0, "3": 1, "5": 2}


def test_a_norm_that_is_excluded_stays_for_the_given_reason_and_takes_no_part() -> None:
    plan = plan_of(chain(), excluded={"3": "It was wrong."})
    assert [step.name for step in plan.steps] == ["1"]
    assert {norm.name: norm.reason for norm in plan.staying}["3"] == "It was wrong."
    assert {norm.name: norm.source for norm in plan.staying} == {"5": None, "3": "2"}


def test_multiply_adds_are_found_where_that_is_allowed_and_but_for_those_that_are_kept() -> None:
    assert plan_of(chain()).multiply_adds == ()
    assert [item.name for item in plan_of(chain(), Options(fuse=True)).multiply_adds] == ["5"]
    assert plan_of(chain(), Options(fuse=True), kept=["5"]).multiply_adds == ()
    assert plan_of(chain(), Options(fuse=True), excluded={"5": "It was wrong."}).multiply_adds == ()


def test_a_norm_that_does_not_run_is_named() -> None:
    net = Wired(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), spare=nn.BatchNorm2d(8))
    plan = plan_of(net)
    assert plan.unreached == ("spare",)
    assert [(norm.name, norm.reason) for norm in plan.staying] == [("spare", "The example inputs do not reach it.")]
    assert plan.order["spare"] > plan.order["bn"]


def test_a_layer_beside_a_norm_absorbs_it_where_that_is_allowed() -> None:
    plan = plan_of(branches())
    (step,) = plan.steps
    assert step.beside is not None
    assert [layer.name for layer in step.beside.layers] == ["conv"]
    assert [call.name for call in step.sums] == ["add"]
    assert plan_of(branches(), Options(beside=False)).steps == ()


def test_readers_of_a_value_that_changes_take_in_the_inverse_where_that_is_allowed() -> None:
    def plan(sharing: bool) -> FoldPlan:
        model = recoverable(lively(shared()))
        return make_plan(model, trace(model, X), Options(sharing=sharing))

    (step,) = plan(True).steps
    assert step.back is not None
    assert [layer.name for layer in step.back.layers] == ["a"]
    assert [layer.name for layer in step.inverse] == ["c"]
    assert plan(False).steps == ()


def test_what_cannot_be_recovered_is_not_inverted() -> None:
    model = recoverable(lively(shared()))
    model.bn.bias.data[1] = 9.0  # more than eight times γ
    assert make_plan(model, trace(model, X), Options()).steps == ()


def test_a_refusal_beside_a_norm_is_added_to_the_reason_once() -> None:
    net = Wired(lambda m, x: torch.tanh(m.conv(x) * 0 + m.bn(x)), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    (staying,) = plan_of(net).staying
    assert staying.reason.count(" Nor can what it is added to: ") == 1
    assert "is multiplied by zero before the sum" in staying.reason
    assert "conv2d" in [call.name for call in staying.obstacles]


@pytest.mark.parametrize("model", [chain, branches])
def test_the_model_is_not_changed(model) -> None:
    net = lively(model())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modules = dict(net.named_modules())
    make_plan(net, trace(net, X), Options(fuse=True, borders=True))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert dict(net.named_modules()) == modules
