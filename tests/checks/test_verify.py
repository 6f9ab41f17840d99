"""A fixed model is compared with the original in one mode: modes, dataflow, the fix's own proof, and outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.checks.flows import TwoWays
from torch import nn

from batchnorm.checks import check
from batchnorm.checks.rules import RULES
from batchnorm.checks.verify import Comparison, in_mode, trace_in_mode
from batchnorm.errors import VerificationError
from batchnorm.models.several import Several

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.train()(X)
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_lasts_for_a_block_and_the_model_is_as_it_was(training: bool) -> None:
    model = net()
    model[1].eval()
    before, state = modes(model), copy.deepcopy(model.state_dict())
    with in_mode(model, training=training):
        assert modes(model) == [training] * 4
        model(X)  # moves the statistics, in training
    assert modes(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    graph = trace_in_mode(model, X, training=training)
    (norm,) = [call for call in graph.calls if "batch_norm" in call.name]
    assert norm.args["training"] is training
    assert modes(model) == before


def compared(change: Any = None, *, fix: bool = True, runs: Several | None = None, training: bool = False) -> Any:
    """Compare a model with its fixed copy, to which something else was done, too."""
    before = net()
    findings = [finding for finding in check(before, X).findings if finding.code == "BN001"]
    after = copy.deepcopy(before)
    dropped: list[str] = []
    if fix:
        assert findings[0].fix is not None
        findings[0].fix.apply(after)
        dropped = ["0.bias"]
    if change is not None:
        with torch.no_grad():
            change(after)
    runs = runs or Several(((X,),), ("the example",))
    return Comparison(before, after, runs, findings, RULES, dropped).in_mode(training=training)


@pytest.mark.parametrize("training", [True, False])
def test_a_right_fix_stays_within_the_rounding(training: bool) -> None:
    agreement = compared(training=training)
    assert 0 <= agreement.error <= agreement.bound < 1e-3


def test_another_operator_is_told() -> None:
    with pytest.raises(VerificationError, match="The fixed model computes something else"):
        compared(lambda model: model.append(nn.Sigmoid()))


@pytest.mark.parametrize("change", [lambda model: model[0].weight.mul_(0.5), lambda model: model[1].bias.add_(0.5)])
def test_an_output_that_moves_is_told_with_its_bound(change: Any) -> None:
    with pytest.raises(VerificationError, match=r"Output \(the only one\) moves by .*; rounding explains .* at most"):
        compared(change)


def test_other_sizes_count_only_where_the_model_runs() -> None:
    small = torch.randn(8, 3, 2, 2)  # less than the kernel
    runs = Several(((X,), (small,)), ("the example", "small pictures"))
    assert compared(runs=runs).error >= 0


def test_a_finding_that_is_none_in_this_mode_is_told() -> None:
    model = TwoWays()
    findings = check(model, X).findings
    runs = Several(((X,),), ("the example",))
    comparison = Comparison(model, copy.deepcopy(model), runs, findings, RULES, [])
    with pytest.raises(VerificationError, match=r"It would not be safe in eval mode: the model runs other code then\."):
        comparison.in_mode(training=False)
