"""Statistics that do not fit and are right are a note."""

from __future__ import annotations

import pytest
from tests.diagnosis.case_of import case_of, gap, run_of
from tests.diagnosis.metrics import HIGHER

import batchnorm
from batchnorm.diagnosis.case import Case
from batchnorm.diagnosis.causes.kept_statistics import KeptStatistics


@pytest.mark.every(4)
@pytest.mark.parametrize("metric", HIGHER, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("count", [1, 6])
def test_statistics_that_the_model_needs_are_no_fault(net, labelled, metric, frozen: bool, count: int) -> None:
    """What is wanted is what the network gives with these statistics: as after a fine-tuning with frozen norms."""
    for norm in (net.bn2, net.bn3, net.bn4):
        norm.running_mean.add_(1.5 * norm.running_var.sqrt())
    if frozen:
        batchnorm.freeze(net)
    result = batchnorm.diagnose(net, labelled(metric)[:count], metric)
    assert result.healthy
    assert "kept_statistics" in [note.cause for note in result.notes]


def told(case: Case) -> list[tuple[list[str], str, str]]:
    return [(list(s.layers), s.evidence, s.cure) for s in KeptStatistics().find(case)]


def test_with_a_metric_the_gaps_that_do_no_harm_are_one_note() -> None:
    good, bad = run_of(0.9, 0.9, 0.9), run_of(0.5, 0.5, 0.5)
    case = case_of(
        gap("a", distance=0.3), gap("b", distance=1.5), gap("c"), deployed=good, training=bad, recalibrated=bad
    )
    case.harmless = {"b", "a"}
    ((layers, evidence, cure),) = told(case)
    assert (layers, cure) == (["a", "b"], "batchnorm.freeze(model)")
    assert evidence == (
        "The stored statistics of 2 of 3 norms are up to 1.5 standard deviations from what they meet, and eval mode is "
        "better with them: the metric is 0.9, on batch statistics 0.5, after a trial recalibration 0.5. Leave them as "
        "they are, and freeze the norms before you train on."
    )


def test_without_a_metric_frozen_norms_that_are_off_are_lived_with() -> None:
    ((layers, evidence, cure),) = told(case_of(gap("a"), gap("b"), gap("c", off=False), frozen=["b", "c"]))
    assert (layers, cure) == (["b"], "")
    assert "they are frozen by batchnorm.freeze: right if the weights were trained since" in evidence
    assert evidence.endswith("A metric would tell.")


def test_gaps_that_nobody_froze_or_found_harmless_are_no_note() -> None:
    assert told(case_of(gap("a"))) == []
    explained = case_of(gap("a"), frozen=["a"])
    explained.explained.add("a")
    assert told(explained) == []
