"""What a cause may look at, and what the training batches exclude."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.diagnosis.case_of import case_of, gap, run_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm
from batchnorm.diagnosis.case import Remedy, Suspicion


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "change", [lambda x: 1 - x, lambda x: x + 2, lambda x: x.flip(1) ** 2], ids=["1 − x", "+ 2", "²"]
)
def test_statistics_that_fit_the_training_batches_exclude_faults_of_the_model(net, batches, home, change) -> None:
    sparse = [batch * (batch.abs() > 1) for batch in batches]  # mostly one vector, as padding is
    at_home = [batch * (batch.abs() > 1) for batch in home]
    batchnorm.recalibrate(net, at_home)
    result = batchnorm.diagnose(net, [change(x) for x in sparse], training_batches=at_home)
    assert {finding.cause for finding in result.findings} <= {"domain_shift", "input_preparation"}
    assert result.findings


def names(layers: Any) -> list[str]:
    return [layer.name for layer in layers]


def test_what_is_explained_or_excluded_is_not_looked_at_again() -> None:
    case = case_of(gap("a"), gap("b", off=False), gap("c"), gap("d"))
    case.explained.add("a")
    case.aside = frozenset({"d"})
    assert names(case.layers) == ["a", "b", "c", "d"]
    assert names(case.left) == ["b", "c"]
    assert names(case.off) == ["c"]


@pytest.mark.parametrize(
    ("runs", "lived_with"),
    [
        ({}, {"b"}),  # without a metric
        ({"deployed": run_of(0.9, 0.9, 0.9)}, {"b"}),  # eval mode is as good
        ({"deployed": run_of(0.5, 0.5, 0.5), "recalibrated": run_of(0.9, 0.9, 0.9)}, set()),
    ],
)
def test_frozen_norms_that_are_off_are_lived_with_unless_the_metric_says_otherwise(
    runs: dict[str, Any], lived_with: set[str]
) -> None:
    case = case_of(gap("a"), gap("b"), gap("c", off=False), frozen=["b", "c"], **runs)
    assert case.lived_with == lived_with
    assert (case.why_frozen(case.layers[1]), case.why_frozen(case.layers[0])) == ("frozen by batchnorm.freeze", "")


@pytest.mark.parametrize(
    ("at_home", "fits"),
    [
        (gap("a", off=False, excess=0.4), True),
        (gap("a", off=False, excess=0.5), False),  # half of what it is off here, and no less
        (gap("a", off=True, excess=0.1), False),
        (gap("b", off=False, excess=0.0), False),  # another norm
    ],
)
def test_statistics_that_fit_the_training_batches_are_off_at_least_twice_as_far_here(at_home: Any, fits: bool) -> None:
    case = case_of(gap("a", excess=1.0), home=[])
    vars(case)["at_home"] = SimpleNamespace(layers=(at_home,))  # measured when first asked for
    assert case.fits_home(case.layers[0]) is fits
    assert case.fitting_home == ({"a"} if fits else set())
    assert case_of(gap("a")).fitting_home == set()


def test_a_fault_of_the_whole_model_is_one_of_small_gaps_too() -> None:
    layers = [gap("a"), gap("b"), gap("c", excess=0.06), gap("d", excess=0.05), gap("e", excess=0.2)]
    case = case_of(*layers)
    case.explained.add("e")
    assert names(case.everywhere(layers[:2])) == ["a", "b"]  # two of five are not most
    assert names(case.everywhere([layers[1], layers[0], layers[4]])) == ["a", "b", "c", "e"]


def test_the_line_that_recalibrates_names_norms_where_not_all_are_meant() -> None:
    case = case_of(gap("a"), gap("b"), gap("c"), frozen=["c"])
    every = case.layers
    assert case.recalibrate(every[:1]) == "batchnorm.recalibrate(model, batches, names=['a'])"
    assert case.recalibrate(every, "home") == 'batchnorm.recalibrate(model, home, names="*")'  # a frozen one is named
    assert case_of(*every).recalibrate(every) == "batchnorm.recalibrate(model, batches)"
    many = case_of(*(gap(str(i)) for i in range(20)))
    assert "names=['0', '1'," in many.recalibrate(many.layers[:12])
    assert many.recalibrate(many.layers[:13]) == 'batchnorm.recalibrate(model, batches, names="*")'


def test_the_basis_of_corrected_norms_and_the_remedies_in_their_order() -> None:
    case = case_of(gap("a"), gap("b"))
    basis = case.corrected(case.layers[:1])
    assert (basis.default, basis.given) == ("stored", {"a": "a"})
    other = Remedy("other()")
    suspicion = Suspicion(["a"], "", "first()", basis, others=[other])
    assert [remedy.code for remedy in suspicion.remedies] == ["first()", "other()"]
    assert suspicion.remedies[0].trial is basis


def test_a_model_counts_what_it_is_an_average_of() -> None:
    average = AveragedModel(nn.Linear(1, 1))
    average.update_parameters(nn.Linear(1, 1))
    average.update_parameters(nn.Linear(1, 1))
    assert case_of(model=average).n_averaged == 2
    assert case_of().n_averaged is None
